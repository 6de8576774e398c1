"""--push_to_hub against a stand-in of the hub: what arrives there, and what is said before and after anything heavy."""

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session

from tests.hub import TOKEN, Hub

SMALL = ["--seqlen", "64", "--nsamples", "4", "--eval_windows", "2", "--method", "magnitude", "--prune_A",
         "--sparsity", "0.5"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("tokenised_once")


@pytest.fixture
def hub(monkeypatch):
    standin = Hub()
    connect(monkeypatch, standin.address)
    yield standin
    standin.close()


def connect(monkeypatch, address, token=TOKEN):
    """What the variables HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_XET and HF_TOKEN would set in a new process."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)
    close_session()


@pytest.fixture
def push(run_main, text_folder, tmp_path):
    """push(...) prunes the demo to tmp_path/out with these flags."""
    return lambda *argv: run_main(["demo", text_folder, *SMALL, "--save", tmp_path / "out", *argv])


def error_of(done):
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_what_was_saved_arrives_byte_by_byte(hub, push, tmp_path):
    done = push("--push_to_hub", "some-org/pruned")
    assert done.code == 0, done.stderr
    saved = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.files == {"some-org/pruned": saved} and not hub.private["some-org/pruned"]
    assert {"README.md", "model.safetensors", "masks.safetensors", "sparsessm.json"} <= saved.keys()
    assert f"pushed: {hub.address}/some-org/pruned" in done.stderr


def test_only_the_checkpoint_and_its_card_are_pushed_again_and_privately(hub, push, tmp_path):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "secret.env").write_text("s")
    (out / "sub" / "config.json").write_text("s")
    for seed in ("0", "1"):
        done = push("--overwrite", "--push_to_hub", "mine", "--private", "--seed", seed)
        assert done.code == 0, done.stderr
    assert hub.private == {"user/mine": True}
    assert hub.files["user/mine"] == {f.name: f.read_bytes() for f in out.iterdir() if f.name not in ("secret.env", "sub")}


@pytest.mark.parametrize(
    ("case", "says"),
    [("no network", "the hub cannot be used"), ("no token", "the hub cannot be used"), ("offline", "the hub cannot be used"),
     ("another token", "Invalid user token"), ("read", "the token may only read"), ("public", "that repository is public"),
     ("name", "cannot be a repository")],
)  # fmt: skip
def test_what_hinders_a_push_is_said_before_anything_heavy(hub, push, tmp_path, monkeypatch, case, says):
    repo, flags = "user/there", []
    if case == "no network":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    elif case == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    elif case == "another token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    elif case == "read":
        hub.role = "read"
    elif case == "public":
        hub.files[repo], hub.private[repo], flags = {}, False, ["--private"]
    elif case == "name":
        repo = "a/b/c"
    else:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        close_session()
    done = push("--push_to_hub", repo, *flags)
    assert done.code == 2 and says in error_of(done), done.stderr
    assert done.folder is None and not (tmp_path / "out").exists()
    assert all(line.startswith("GET ") for line in hub.asked)


def test_a_failed_push_keeps_the_folder_and_says_how_to_push_it_later(hub, push, tmp_path):
    hub.broken = "/commit/"
    done = push("--push_to_hub", "user/pruned")
    assert done.code == 2 and done.metrics["perplexity"]
    assert error_of(done).endswith(f"to push it later: hf upload user/pruned {tmp_path / 'out'}")
    assert (tmp_path / "out" / "model.safetensors").is_file() and not hub.files["user/pruned"]


@pytest.mark.parametrize(
    ("argv", "says"), [(["--push_to_hub", "user/x"], "add --save"), (["--private"], "add --push_to_hub")]
)  # fmt: skip
def test_flags_that_do_nothing_alone(run_main, argv, says):
    done = run_main(["demo", "demo", *SMALL, *argv])
    assert done.code == 2 and says in done.stderr
