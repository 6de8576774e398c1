"""What is installed: versions that agree, a wheel that holds what the package reads, static checks that are clean."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import sparsessm

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = {file.stem.removeprefix("requirements-"): file for file in ROOT.glob("requirements-*.txt")}


def call(*argv, cwd=ROOT, env=None):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, cwd=cwd, env=env)


def in_file(file: Path) -> set[str]:
    """What a requirements file asks for, and those that it names."""
    found = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found |= in_file(file.parent / line.removeprefix("-r ").strip())
        elif line:
            assert str(Requirement(line)) not in found, f"{file.name} names {line} twice"
            found.add(str(Requirement(line)))
    return found


def in_project(requirements) -> set[str]:
    """The same for a list of pyproject.toml, which names its extras instead of files."""
    found = set()
    for requirement in map(Requirement, requirements):
        if requirement.name != PROJECT["name"]:
            found.add(str(requirement))
            continue
        found |= in_project(PROJECT["dependencies"])
        for extra in requirement.extras:
            found |= in_project(PROJECT["optional-dependencies"][extra])
    return found


def test_the_project_asks_for_what_the_requirements_ask_for():
    assert in_project(PROJECT["dependencies"]) == in_file(ROOT / "requirements.txt")
    assert PROJECT["optional-dependencies"].keys() == FILES.keys() == {"zero-shot", "cuda", "test"}


@pytest.mark.parametrize("extra", FILES)
def test_an_extra_asks_for_what_its_file_asks_for(extra):
    assert in_project(PROJECT["optional-dependencies"][extra]) == in_file(FILES[extra])


def test_every_version_is_pinned():
    for file in [ROOT / "requirements.txt", *FILES.values()]:
        for requirement in map(Requirement, in_file(file)):
            assert [pin.operator for pin in requirement.specifier] == ["=="], requirement


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## [")]
    assert citation["version"] == sparsessm.__version__ == str(Version(sparsessm.__version__))
    assert released[0] == "## [Unreleased]" and released[1].startswith(f"## [{sparsessm.__version__}] - ")
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT


def test_one_licence_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"] and "Copyright 2026 The sparsessm authors" in text


@pytest.mark.parametrize("program", [["main.py"], ["-m", "sparsessm"]], ids=" ".join)
def test_help_is_quick_and_names_the_program(program):
    script = (
        "import runpy, sys\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n"
        "    runpy.run_path('main.py', run_name='__main__') if sys.argv[0] == 'main.py' else "
        "runpy.run_module('sparsessm', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = call("-c", script, program[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python {' '.join(program)} ")


def test_a_mistake_ends_the_module_as_it_ends_the_script():
    for program in (["main.py"], ["-m", "sparsessm"]):
        done = call(*program, "demo")
        assert done.returncode == 2 and done.stderr.startswith("error: give a MODEL and a DATASET")


def test_ruff_finds_nothing():
    done = call("-m", "ruff", "check", ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_mypy_finds_nothing():
    done = call("-m", "mypy", "sparsessm", "main.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_hooks_fetch_nothing_and_find_what_they_are_for(tmp_path):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert {hook["language"] for hook in hooks.values()} == {"system", "pygrep"}
    for size, code in ((1_000_000, 0), (1_000_001, 1)):
        (tmp_path / "a file").write_bytes(b"\0" * size)
        argv = [*shlex.split(hooks["large-files"]["entry"]), str(tmp_path / "a file")]
        assert subprocess.run(argv, capture_output=True).returncode == code
    argv = [*shlex.split(hooks["ruff"]["entry"]), "main.py"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    assert subprocess.run(argv, cwd=ROOT, capture_output=True, env={**os.environ, "PATH": path}).returncode == 0


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this tree, laid out as an installer would."""
    if importlib.util.find_spec("setuptools") is None or Version(metadata.version("setuptools")) < Version("77"):
        pytest.skip("a wheel is built by setuptools 77 or later, which is not installed")
    tree, wheels, place = (tmp_path_factory.mktemp(name) for name in ("tree", "wheels", "place"))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("which files are the project's is known to git alone, and this is no clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    done = call("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", wheels, tree)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    assert wheel.name == f"sparsessm-{sparsessm.__version__}-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(place)
    return place


def from_wheel(installed, *argv):
    """By the package as installed; the fast scan would be compiled anew for its place."""
    env = {**os.environ, "PYTHONPATH": str(installed), "NUMBA_DISABLE_JIT": "1"}
    return call(*argv, cwd=installed.parent, env=env)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(installed):
    package = {str(file.relative_to(installed)) for file in (installed / "sparsessm").rglob("*") if file.is_file()}
    listed = subprocess.run(["git", "ls-files", "sparsessm"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert package == set(listed)
    data = ("py.typed", "report/page.css", "report/page.html", "report/page.js")
    assert {f"sparsessm/{name}" for name in data} <= package
    assert {file.name for file in installed.iterdir()} == {"sparsessm", f"sparsessm-{sparsessm.__version__}.dist-info"}


@pytest.mark.slow
def test_the_wheel_says_what_it_is(installed):
    (found,) = metadata.distributions(path=[str(installed)])
    about = found.metadata
    assert (about["Name"], about["Version"]) == ("sparsessm", sparsessm.__version__)
    assert about["License-Expression"] == "Apache-2.0" and about["Author"] == "The sparsessm authors"
    assert about["Requires-Python"] == ">=3.11"
    plain = {str(Requirement(line)) for line in found.requires if "extra ==" not in line}
    assert plain == in_file(ROOT / "requirements.txt")
    assert (installed / f"sparsessm-{sparsessm.__version__}.dist-info" / "licenses" / "LICENSE").is_file()


@pytest.mark.slow
def test_the_installed_command_answers_without_torch(installed):
    script = (
        "import sys\n"
        "from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='console_scripts', name='sparsessm')\n"
        "main = point.load()\n"
        "sys.argv = ['/usr/bin/sparsessm', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = from_wheel(installed, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: sparsessm ")


@pytest.mark.slow
def test_the_installed_package_prunes_and_says_where_the_demo_is(installed, tiny_checkpoint, text_folder, tmp_path):
    done = from_wheel(installed, "-m", "sparsessm", "demo", "demo", "--base_dir", tmp_path / "runs")
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert done.stderr.splitlines() == [
        "error: the model demo comes with a clone of the repository: run there, or give a folder or a hub id"
    ]
    argv = ["--method", "sparsessm", "--prune_A", "--sparsity", "0.5", "--nsamples", "2", "--seqlen", "64", "--eval_dense"]
    done = from_wheel(
        installed, "-m", "sparsessm", tiny_checkpoint(), text_folder, *argv, "--eval_windows", "2",
        "--base_dir", tmp_path / "runs",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("sparsessm  ssm 50.0%")
