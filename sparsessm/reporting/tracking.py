"""What a run leaves behind: BASE_DIR/EXPERIMENT/TIME/ with its options, log, events and figures; wandb where asked."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sparsessm.errors import InputError
from sparsessm.reporting.plots import has_matplotlib, write_run_plots
from sparsessm.reporting.results import read_run

logger = logging.getLogger("sparsessm")


def check_wandb() -> None:
    """Raises InputError where wandb is wanted and not there."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--log_wandb needs wandb: pip install wandb, or leave the flag out")


class Run:
    """The folder of one run, its log, its progress bar, and its wandb run if there is one."""

    def __init__(
        self, options: Mapping[str, Any], *, log_wandb: bool = False, resumed: Path | None = None, speaks: bool = True
    ) -> None:
        """Opens a new folder for the options, or that of the interrupted run `resumed`.

        speaks: False in all processes but the first: they write nothing, and have no folder unless it is resumed.
        """
        self.started = time.monotonic()
        self.speaks, self.folder = speaks, resumed
        self._bar: tqdm | None = None
        self._phase: str | None = None
        self._handlers: list[logging.Handler] = []
        self._wandb = None
        logger.setLevel(logging.INFO if speaks else logging.ERROR)
        if not speaks:
            return
        if resumed is None:
            self.folder = _new_folder(Path(options["base_dir"]).expanduser() / options["experiment_name"])
        self._handlers = [logging.FileHandler(self.folder / "output.log"), logging.StreamHandler(sys.stderr)]
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
        self.write_json("options.json", options)
        if log_wandb:
            import wandb

            self._wandb = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sparsessm"), config=dict(options), dir=str(self.folder),
                name=f"{self.folder.parent.name}-{self.folder.name}", job_type="prune" if options["method"] else "eval",
            )  # fmt: skip

    def write_json(self, name: str, content: Any) -> None:
        """Writes a file of the run folder, whole or not at all."""
        if not self.speaks:
            return
        path = self.folder / name
        partial = path.with_name(f".{name}.partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(path)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a safetensors file of the run folder, whole or not at all; no file for no tensors."""
        if not self.speaks or not tensors:
            return
        path = self.folder / name
        partial = path.with_name(f".{name}.partial")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        partial.replace(path)

    def event(self, kind: str, **fields: Any) -> None:
        """Appends a line to events.jsonl: the kind, seconds since the start, and the fields."""
        if not self.speaks:
            return
        line = {"event": kind, "seconds": round(time.monotonic() - self.started, 3), **fields}
        with (self.folder / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def report(self, phase: str, layer: int, **figures: float) -> None:
        """Notes a finished layer: an event, a step of the progress bar, a row on wandb."""
        if phase != self._phase:
            self._close_bar()
            # quiet when nobody watches: a log full of bars helps no one
            self._bar = tqdm(desc=phase, unit="layer", disable=not (self.speaks and sys.stderr.isatty()), leave=False)
            self._phase = phase
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        self._bar.update()
        if figures:
            self.event("layer", phase=phase, layer=layer, **figures)
            if self._wandb is not None:
                self._wandb.log({f"{phase}/{name}": value for name, value in figures.items()} | {"layer": layer})

    def finish(self, metrics: Mapping[str, Any], saved: Path | None) -> None:
        """Writes metrics.json and hands metrics and the saved folder to wandb."""
        self.write_json("metrics.json", metrics)
        self.event("finished")
        if self._wandb is not None:
            import wandb

            self._wandb.summary.update(_flat(metrics))
            if saved is not None:
                artifact = wandb.Artifact(f"checkpoint-{self._wandb.id}", type="model")
                artifact.add_dir(str(saved))
                self._wandb.log_artifact(artifact)
            self._log_plots()

    def _log_plots(self) -> None:
        """Hands the pictures of this run to wandb, where there is matplotlib to draw them."""
        import wandb

        if not has_matplotlib():
            logger.info("wandb: no pictures, for matplotlib is not installed (pip install -r requirements-plots.txt)")
            return
        with tempfile.TemporaryDirectory() as folder:
            files = write_run_plots(read_run(self.folder), Path(folder))
            if files:
                self._wandb.log({f"plots/{kind}": wandb.Image(str(file)) for kind, file in files.items()})

    def close(self, failed: bool = False) -> None:
        """Lets go of the log and the bar, and ends the wandb run."""
        self._close_bar()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._phase = None, None


def _new_folder(parent: Path) -> Path:
    """A folder named after the time; of two runs in one second, the later gets a number."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        for number in range(1000):
            folder = parent / (f"{stamp}-{number}" if number else stamp)
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                if parent.exists() and not parent.is_dir():
                    raise
    except OSError as error:
        raise InputError(f"no run folder under {parent} ({error.strerror}): choose --base_dir elsewhere") from None
    raise InputError(f"no free name for a run under {parent}: choose another --experiment_name")


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures by their path, as wandb's tables want them."""
    flat = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
