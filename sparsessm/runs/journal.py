"""The finished layers of a run, so that a killed one can be resumed (--resume).

RUN/layers/PHASE-LAYER.safetensors holds what pruning made of one layer: new values by the parameter's name, masks as
`mask:NAME`. RUN/layers/NAME.json holds figures. A file appears whole or not at all; the stream is not kept, because
the finished layers recompute it. When a run ends its journal is removed.

What is found is checked against what the run expects: a journal that was damaged or edited is refused, never mixed in.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsessm.errors import InputError, first_line, storing
from sparsessm.files import strict_json, write_whole

FOLDER = "layers"
_MASK = "mask:"
Shapes = Mapping[str, Sequence[int]]


class Journal:
    """The journal of one run. It can `load` only what was there when it was opened: all processes see the same."""

    def __init__(self, folder: Path | None, *, writes: bool = True) -> None:
        """folder: of the run, None for a journal that keeps nothing. writes: False in all processes but the first.

        Raises:
            InputError: the journal is a link to elsewhere.
        """
        self.folder = folder and folder / FOLDER
        self.writes = writes and folder is not None
        if self.folder and self.folder.is_symlink():
            raise InputError(f"{self.folder} is a link: remove it, or start a new run")
        if self.folder and self.writes:
            with storing(str(self.folder), "choose --base_dir elsewhere"):
                self.folder.mkdir(exist_ok=True)
        self.found = set()
        if self.folder and self.folder.is_dir():
            self.found = {path.name for path in self.folder.iterdir() if path.is_file() and not path.is_symlink()}

    def load(
        self, phase: str, layer: int, values: Shapes, masks: Shapes
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """(values, masks) of a finished layer, by parameter name; None if it is still to be done.

        Args:
            values, masks: names and shapes that the layer must have.

        Raises:
            InputError: the file is cut short, or holds something else.
        """
        name = f"{phase}-{layer:04d}.safetensors"
        if name not in self.found:
            return None
        try:
            tensors = load_file(self._file(name))
        except (SafetensorError, OSError, ValueError) as error:
            raise self._refusal(name, first_line(error)) from None
        expected = {key: tuple(shape) for key, shape in values.items()}
        expected |= {_MASK + key: tuple(shape) for key, shape in masks.items()}
        if tensors.keys() != expected.keys():
            other = sorted(tensors.keys() ^ expected.keys())[0]
            raise self._refusal(name, f"{other} is {'missing' if other in expected else 'not of this layer'}")
        for key, tensor in tensors.items():
            if tuple(tensor.shape) != expected[key]:
                raise self._refusal(name, f"{key} has shape {tuple(tensor.shape)}, the model's is {expected[key]}")
            if (tensor.dtype == torch.bool) != key.startswith(_MASK) or not (
                tensor.dtype == torch.bool or torch.isfinite(tensor).all()
            ):
                raise self._refusal(name, f"{key} holds other values than pruning makes")
        found = {key.removeprefix(_MASK): value for key, value in tensors.items() if key.startswith(_MASK)}
        return {key: value for key, value in tensors.items() if not key.startswith(_MASK)}, found

    def store(self, phase: str, layer: int, values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Records a finished layer."""
        tensors = dict(values) | {_MASK + name: mask for name, mask in masks.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(f"{phase}-{layer:04d}.safetensors", lambda path: save_file(tensors, path))

    def load_figures(self, name: str, check: Callable[[Any], bool] = lambda figures: True) -> Any | None:
        """The figures that `store_figures` recorded under the name, or None.

        Args:
            check: whether figures have the expected form.

        Raises:
            InputError: the file is no JSON or fails the check.
        """
        file = f"{name}.json"
        if file not in self.found:
            return None
        try:
            figures = json.loads(self._file(file).read_text(encoding="utf-8"), parse_constant=_no_constant)
            if check(figures):
                return figures
            reason = "it holds other figures than a run writes"
        except (OSError, ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = first_line(error)
        raise self._refusal(file, reason)

    def store_figures(self, name: str, figures: Any) -> None:
        text = strict_json(figures)
        self._write(f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))

    def confirm(self, name: str, figures: Any, what: str) -> None:
        """Records figures, or checks that they are what was recorded before the run was interrupted.

        Raises:
            InputError: where they are not: resuming would mix two runs.
        """
        before = self.load_figures(name)
        now = json.loads(strict_json(figures))
        if before is not None and before != now:
            which = ""
            if isinstance(before, dict) and isinstance(now, dict):
                names = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
                which = f" ({', '.join(names)})"
            raise InputError(f"--resume: {what} changed since the run was interrupted{which}; start a new run")
        if before is None:
            self.store_figures(name, figures)

    def close(self) -> None:
        """Removes the journal of a run that has ended."""
        if self.folder and self.writes:
            remove_journal(self.folder.parent)

    def _file(self, name: str) -> Path:
        assert self.folder is not None  # without one there is nothing to read or write
        return self.folder / name

    def _refusal(self, name: str, reason: str) -> InputError:
        return InputError(
            f"--resume: {self._file(name)} is damaged or was edited ({reason}): remove that file to have the step done "
            "again, or start a new run"
        )

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        if not self.writes:
            return
        file = self._file(name)
        with storing(str(file), "free some space"):
            write_whole(file, write, follow=False)


def remove_journal(run: Path) -> None:
    """Removes what is left of the journal of a run that has finished."""
    folder = run / FOLDER
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def is_number(value: Any) -> bool:
    """Whether JSON gave a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")
