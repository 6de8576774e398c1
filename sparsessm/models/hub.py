"""A saved checkpoint on the Hugging Face hub: whether it can be pushed, and the push. The token is the hub library's."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from sparsessm.errors import InputError, first_line
from sparsessm.models.card import CARD
from sparsessm.models.place import is_checkpoint_file


def check_hub(repo: str, private: bool) -> None:
    """Whether the hub knows the token and would take a push; looks and changes nothing.

    Raises:
        InputError: no token or one that may not write, no network, an impossible name, or a public repository where a
            private one is wanted.
    """
    api, asked = HfApi(), f"--push_to_hub {repo}"
    try:
        user = api.whoami()
        found = api.model_info(repo if "/" in repo else f"{user['name']}/{repo}")
        public = private and not found.private
    except HFValidationError as error:
        raise InputError(f"{asked} cannot be a repository ({first_line(error)}): give USER/NAME") from None
    except RepositoryNotFoundError:
        public = False
    except Exception as error:  # of the token, the hub, the network, its proxies: they share no base class
        raise InputError(
            f"{asked}: the hub cannot be used ({first_line(error)}): log in by `hf auth login` or set HF_TOKEN, check the "
            "network, or leave the flag out"
        ) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"{asked}: the token may only read: make one that may write, and set HF_TOKEN")
    if public:
        raise InputError(f"{asked} --private: that repository is public: name another one, or leave --private out")


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads the files of a checkpoint and its card, and nothing else of the folder; returns the repository's address.

    Args:
        private: whether a new repository is private; otherwise the hub's own default holds.

    Raises:
        InputError: the hub refuses, or cannot be reached; the folder is as it was.
    """
    api = HfApi()
    names = [file.name for file in folder.iterdir() if is_checkpoint_file(file) or file.name == CARD]
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, allow_patterns=names, commit_message="Model pruned by sparsessm"
        )
    except Exception as error:  # the same
        later = f"hf upload {shlex.quote(repo)} {shlex.quote(str(folder))}"
        raise InputError(
            f"--push_to_hub {repo} failed ({first_line(error)}): the model is saved in {folder}; to push it later: {later}"
        ) from error
    return str(made)
