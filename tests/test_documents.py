"""The commands of all documents: run as they stand, or marked with what they need and then read at least.

A command is a line of an indented or fenced block that begins with a program of _PROGRAMS. What it needs stands behind it,
`# needs a GPU`, or, for all of a page, in a line "The commands of this page need ...".
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsessm import commandline

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/**/*.md")] if path.name != "CHANGELOG.md"
)
_PROGRAMS = ("python", "bash", "torchrun", "sparsessm", "wandb", "sbatch", "srun", "hf", "pip", "ls")
_NEEDS = re.compile(r"#.*\bneeds (.+)$")
_WHOLE_PAGE = re.compile(r"^The commands of this page need (.+?)[.;:]", re.MULTILINE)
_FIGURE = re.compile(r"(perplexity on .*): ([0-9.]+) \(.* windows\)")
# Perplexities that a page says a command prints, by page and command.
FIGURES: dict[tuple[str, str], list[tuple[str, float]]] = {}
# What stands for a folder or a name of the reader's, and what the tests put there.
PLACES = {"MODEL": "demo", "DATASET": "demo", "TEXT_FOLDER": "texts", "METHOD": "magnitude"}
# What is added to a command so that it takes seconds: fewer runs of the same kind.
FEWER = {
    "scripts/reproduce.py": ["--only", "dense", "--seeds", "0"],
    "scripts/sweep_local.py": ["--set", "model_path=demo", "dataset=demo", "seqlen=64", "nsamples=4", "eval_windows=4",
                               "aggregate=vote", "saliency=a_log", "--seeds", "0"],
}  # fmt: skip


def blocks(page):
    """The indented and fenced blocks of a page, as lists of lines."""
    found, fenced, inside = [[]], False, False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced, inside = not fenced, line.startswith(("```bash", "```console"))
            found.append([])
        elif fenced:
            if inside:
                found[-1].append(line)
        elif line.startswith("    "):
            found[-1].append(line[4:])
        elif line.strip():
            found.append([])
    return [block for block in found if block]


def commands(page):
    """(command on one line, what it needs or None) of a page, in order."""
    whole, found = _WHOLE_PAGE.search(page.read_text(encoding="utf-8")), []
    for block in blocks(page):
        shown = any(line.startswith("$ ") for line in block)  # what is printed stands there too
        for line in "\n".join(block).replace("\\\n", " ").split("\n"):
            if shown and not line.startswith("$ "):
                if found and (figure := _FIGURE.fullmatch(line)):
                    FIGURES.setdefault((page.name, found[-1][0]), []).append((figure.group(1), float(figure.group(2))))
                continue
            words = line.removeprefix("$ ").split()
            while words and re.match("[A-Z_]+=", words[0]):
                words = words[1:]  # a variable of the environment
            if len(words) > 1 and words[0] in _PROGRAMS:
                need = _NEEDS.search(line)
                text = " ".join(shlex.split(line.removeprefix("$ ").split("  #")[0], posix=False))
                found.append((text, need.group(1) if need else whole.group(1) if whole else None))
    return found


COMMANDS = [(page, *command) for page in PAGES for command in commands(page)]


def test_pages_have_commands():
    names = {page.name for page, *_ in COMMANDS}
    assert {"README.md", "TUTORIAL.md", "EXPERIMENTS.md", "BENCHMARKS.md", "CONTRIBUTING.md"} <= names
    assert sum(need is None for *_, need in COMMANDS) > 10


@pytest.mark.parametrize(("page", "command"), [(page.name, text) for page, text, _ in COMMANDS])
def test_a_command_is_one_that_the_programs_know(page, command):
    words = shlex.split(command)
    scripts = [word for word in words if word.startswith("scripts/") and word.endswith((".py", ".sh"))]
    assert all((ROOT / script).is_file() for script in scripts), command
    if "main.py" in words or words[0] == "sparsessm":
        arguments = words[words.index("main.py") + 1 :] if "main.py" in words else words[1:]
        arguments = [PLACES.get(word, word) for word in arguments]
        if not {"--resume", "--help", "--version", "--config", "..."} & set(arguments):
            commandline.parse(arguments)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, text_folder):
    """A folder in which the repository's files lie as in a clone, and what pages leave is gone afterwards."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("main.py", "sparsessm", "scripts", "data"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "texts").symlink_to(text_folder)
    return folder


@pytest.fixture
def run_program(desk, monkeypatch, capsys, tokenised_once):
    """run_program(words, environment) -> exit code and stderr of `python PROGRAM ...` on the desk.

    A program of the repository runs in this process: that it runs in one of its own is held by other tests, and each would
    take seconds to import torch and to read the same text.
    """
    monkeypatch.chdir(desk)
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(words, environment):
        if words[0] != "python" or not words[1].endswith(".py"):
            modules = {"python": (), "sparsessm": ("-m", "sparsessm"), "torchrun": ("-m", "torch.distributed.run")}
            words = [sys.executable, *modules[words[0]], *words[1:]] if words[0] in modules else words
            done = subprocess.run(words, capture_output=True, text=True, env=os.environ | environment)
            return done.returncode, done.stderr
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                runpy.run_path(words[1], run_name="__main__")
        return end.value.code or 0, capsys.readouterr().err

    return run


RUN = [page for page in PAGES if any(need is None for _, need in commands(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_commands_without_a_mark_run_in_their_order(page, run_program):
    for text, need in commands(page):
        if need is None:
            environment, words = {}, [PLACES.get(word, word) for word in shlex.split(text)]
            while "=" in words[0]:
                environment |= [words.pop(0).split("=", 1)]
            words += next((more for script, more in FEWER.items() if script in words), [])
            code, said = run_program(words, environment)
            assert code == 0, f"{text}\n{said}"
            printed = dict(match.groups() for line in said.split("\n") if (match := _FIGURE.fullmatch(line)))
            for name, value in FIGURES.get((page.name, text), []):
                assert float(printed[name]) == pytest.approx(value, rel=5e-3), text


def test_the_page_about_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "PYTHON.md").read_text(encoding="utf-8"), re.DOTALL)
    scope = {}
    for block in code:
        exec(compile(block, "docs/PYTHON.md", "exec", dont_inherit=True), scope)
    assert 0 < scope["after"] / scope["before"] < 1.1
    saved = AutoModelForCausalLM.from_pretrained("pruned").get_parameter("backbone.layers.0.mixer.A_log")
    assert torch.equal(saved >= 30, scope["masks"]["backbone.layers.0.mixer.A_log"])
