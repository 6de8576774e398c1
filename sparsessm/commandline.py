"""The command line: `parse` makes Options of argv, of a file of options, or of the folder of an interrupted run."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparsessm.corpora.names import DATASETS, with_full_path
from sparsessm.errors import InputError, first_line
from sparsessm.options import GROUPS, Options
from sparsessm.pruning.methods import METHODS
from sparsessm.version import __version__

_USAGE = """{0} MODEL DATASET --method METHOD --prune_A --prune_layers --sparsity SHARE [--save DIR] [...]
       {0} MODEL DATASET             measures a model as it is
       {0} --resume RUN_FOLDER       goes on with an interrupted run"""


def program() -> str:
    """How this program was called, as far as argv tells: main.py, the module or the installed command."""
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name == "__main__.py" and called.parent.name == "sparsessm":
        return "python -m sparsessm"
    if called.name == "sparsessm":
        return "sparsessm"
    return f"python {shlex.quote(str(called)) if called.name.endswith('main.py') else 'main.py'}"


class Parser(argparse.ArgumentParser):
    """A mistake in the arguments is an InputError, one line like any other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Defaults where there is one worth saying; no [BOOL] after the flags."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.metavar == "BOOL" else super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return super()._format_action_invocation(action).replace(" ,", ",").rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        default, told = action.default, action.help or ""
        if default is None or default is False or default is argparse.SUPPRESS or isinstance(action.nargs, int):
            return told
        shown = " ".join(default) if isinstance(default, tuple) else default
        return told if shown == [] else f"{told} (default: {shown})"


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        from importlib.metadata import version

        used = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        print(f"sparsessm {__version__} (python {sys.version.split()[0]}, {used})")
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program(),
        usage=_USAGE.format(program()),
        description="Prune a Mamba language model, or a hybrid, in one shot; measure its perplexity; save it.\n"
        "A flag without a value takes True or False too: --prune_A, --prune_A True, --prune_A False.",
        epilog="methods:\n" + "\n".join(f"  {name:<15} {method.about}" for name, method in METHODS.items()),
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: _Help(prog, max_help_position=30),
    )
    for spec in dataclasses.fields(Options):
        if spec.name in GROUPS:
            group = parser.add_argument_group(GROUPS[spec.name])
        if spec.name == "model":
            group.add_argument("positionals", nargs="*", metavar="MODEL DATASET", help="for --model_path, --dataset")
        arguments = dict(spec.metadata)
        names = ["--model_path" if spec.name == "model" else f"--{spec.name}", *arguments.pop("names")]
        if "choices" not in arguments:
            arguments.setdefault("metavar", _METAVARS.get(arguments.get("type"), "NAME"))
        group.add_argument(*names, dest=spec.name, default=spec.default, **arguments)
    group = parser.add_argument_group("instead of options, and about this program")
    group.add_argument("--config", metavar="FILE", help="take options from a YAML file, or from the options.json of a run; "
                       "those of the command line win")  # fmt: skip
    group.add_argument("--resume", metavar="RUN_FOLDER", help="resume an interrupted run; takes no other option")
    group.add_argument("--version", nargs=0, action=_Version, default=argparse.SUPPRESS, help="print the versions and stop")
    group.add_argument("-h", "--help", action="help", help="print this and stop")
    return parser


_METAVARS: dict[Any, str] = {int: "N", float: "X"}


def parse(argv: Sequence[str]) -> tuple[Options, Path | None]:
    """Options from the command line, and the folder of the run to resume, if any.

    Raises:
        InputError: for unknown flags and for whatever `check` finds.
    """
    known = _known(argv)
    if known["resume"] is not None:
        if len(argv) > 2 or known["model"] is not None:
            raise InputError("--resume takes the options of the run that it resumes: leave out all others")
        return _recorded(Path(known["resume"])), Path(os.path.abspath(Path(known["resume"]).expanduser()))
    if known["config"] is not None:
        given = {name for name in ("model", "dataset") if known[name] is not None}
        values = {name: value for name, value in _read_config(known["config"]).items() if name not in given}
        known = _known([*argv_of(values), *argv])
    del known["config"], known["resume"]
    return _frozen(known), None


def _known(argv: Sequence[str]) -> dict[str, Any]:
    """The arguments by name; the model and the data set from where they are given."""
    known = vars(_parser().parse_intermixed_args(list(argv)))
    positionals = known.pop("positionals")
    if len(positionals) > 2:
        raise InputError(f"expected MODEL and DATASET, got {len(positionals)} arguments: {' '.join(positionals)}")
    for name, word in zip(("model", "dataset"), positionals, strict=False):
        if known[name] is not None:
            raise InputError(f"the {name} is given twice: {word} and {known[name]}")
        known[name] = word
    return known


def _read_config(file: str) -> dict[str, Any]:
    """The options of a file by their names.

    Raises:
        InputError: the file cannot be read, or names what is no option.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"--config {file} cannot be read ({first_line(error)}): give a YAML file of options") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {file} holds no options: write one a line, as  sparsity: 0.5")
    spellings = {spec.name: spec.name for spec in dataclasses.fields(Options)} | {"model_path": "model"}
    spellings |= {name.lstrip("-"): spec.name for spec in dataclasses.fields(Options) for name in spec.metadata["names"]}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in spellings:
            near = difflib.get_close_matches(str(name), spellings, 1)
            raise InputError(f"--config {file}: there is no option {name}" + (f", did you mean {near[0]}?" if near else ""))
        if spellings[name] in found:
            raise InputError(f"--config {file} gives {spellings[name]} twice")
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)):
            raise InputError(f"--config {file}: {name} must be a value or a list of values")
        found[spellings[name]] = value
    return found


def _frozen(values: dict[str, Any]) -> Options:
    """Options with absolute paths, without ~."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for name in ("data_dir", "zero_shot_include", "save", "base_dir"):
        if values[name] is not None:
            values[name] = os.path.abspath(os.path.expanduser(values[name]))
    model = os.path.expanduser(values["model"] or "")
    if values["model"] != "demo" and os.path.isdir(model):
        values["model"] = os.path.abspath(model)
    if values["dataset"] is not None:
        values["dataset"] = with_full_path(values["dataset"])
    if values["ppl_datasets"] is not None:
        values["ppl_datasets"] = tuple(with_full_path(name, (*DATASETS, "none")) for name in values["ppl_datasets"])
    return Options(**values)


def _recorded(folder: Path) -> Options:
    """The options of an interrupted run, checked as if they came from the command line."""
    folder = Path(os.path.abspath(folder.expanduser()))
    file = folder / "options.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"--resume {folder} holds no options.json: give the folder of a run") from None
    known = {spec.name for spec in dataclasses.fields(Options)}
    if not isinstance(values, dict) or values.keys() != known:
        odd = sorted(values.keys() ^ known)[0] if isinstance(values, dict) else "it holds no values by name"
        raise InputError(f"--resume {folder} was written by another version (options.json: {odd}): start a new run")
    try:
        chosen = parse(argv_of(values))[0]
    except InputError as error:
        raise InputError(f"--resume {folder}: options.json was edited ({error}): start a new run") from None
    parsed = json.loads(json.dumps(dataclasses.asdict(chosen)))
    for name, value in values.items():
        if parsed[name] != value or isinstance(parsed[name], bool) != isinstance(value, bool):
            shown = json.dumps(value)[:60]
            raise InputError(f"--resume {folder}: options.json was edited ({name} is {shown}): start a new run")
    return chosen


def argv_of(values: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that say the same as the values of options.json."""
    argv = []
    for name, value in values.items():
        flag = "--model_path" if name == "model" else f"--{name}"
        if isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        elif value is not None:
            argv.append(f"{flag}={value}")
    return argv


def words_of(values: Mapping[str, Any]) -> list[str]:
    """The same as a person writes it: --prune_A --sparsity 0.5 --parts mixer mlp."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [] if value is True else [value])]
    return words


def reproducing(chosen: Options) -> str:
    """The command that does the same, with the options that are not the default; folders by their last name alone."""
    said = {spec.name: chosen.settings.get(spec.name, spec.default) for spec in dataclasses.fields(Options)}
    said = {spec.name: said[spec.name] for spec in dataclasses.fields(Options) if said[spec.name] != spec.default}
    model, dataset = (_last_name(said.pop(name)) for name in ("model", "dataset"))
    return shlex.join(["python", "main.py", model, dataset, *argv_of({k: _last_name(v) for k, v in said.items()})])


def _last_name(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_last_name, value))
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
