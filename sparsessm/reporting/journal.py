"""What a run has finished, layer by layer, so that a killed one can go on (--resume).

RUN/layers/PHASE-LAYER.safetensors holds what pruning made of one layer: new values by the parameter's name, masks as
`mask:NAME`. RUN/layers/NAME.json holds figures. A file appears whole or not at all; the stream is not kept, for the
layers that are done make it anew. When a run ends its journal goes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsessm.errors import InputError

_MASK = "mask:"


class Journal:
    """The journal of one run. What it can `load` is what stood there when it was opened: all processes see the same."""

    def __init__(self, folder: Path | None, *, writes: bool = True) -> None:
        """folder: of the run, None for a journal that keeps nothing. writes: False in all processes but the first."""
        self.folder = folder and folder / "layers"
        self.writes = writes and folder is not None
        if self.writes:
            self.folder.mkdir(exist_ok=True)
        self.found = {p.name for p in self.folder.iterdir()} if self.folder and self.folder.is_dir() else set()

    def load(self, phase: str, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """(values, masks) of a finished layer, by parameter name; None if it is still to be done."""
        name = f"{phase}-{layer:04d}.safetensors"
        if name not in self.found:
            return None
        tensors = load_file(self.folder / name)
        masks = {key.removeprefix(_MASK): value for key, value in tensors.items() if key.startswith(_MASK)}
        return {key: value for key, value in tensors.items() if not key.startswith(_MASK)}, masks

    def store(self, phase: str, layer: int, values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Records a finished layer."""
        tensors = dict(values) | {_MASK + name: mask for name, mask in masks.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(f"{phase}-{layer:04d}.safetensors", lambda path: save_file(tensors, path))

    def load_figures(self, name: str) -> Any | None:
        """What `store_figures` recorded under the name, or None."""
        return json.loads((self.folder / f"{name}.json").read_text()) if f"{name}.json" in self.found else None

    def store_figures(self, name: str, figures: Any) -> None:
        self._write(f"{name}.json", lambda path: path.write_text(json.dumps(figures)))

    def confirm(self, name: str, figures: Any, what: str) -> None:
        """Records figures, or checks that they are what was recorded before the run was interrupted.

        Raises:
            InputError: where they are not: going on would mix two runs.
        """
        before = self.load_figures(name)
        if before is not None and before != json.loads(json.dumps(figures)):
            raise InputError(f"--resume: {what} changed since the run was interrupted; start it anew")
        self.store_figures(name, figures)

    def close(self) -> None:
        """Removes the journal of a run that has ended."""
        if self.writes:
            shutil.rmtree(self.folder)

    def _write(self, name: str, write: Any) -> None:
        if not self.writes:
            return
        partial = self.folder / f".{name}.partial"
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(self.folder / name)
