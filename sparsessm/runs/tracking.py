"""The folder of a run: BASE_DIR/EXPERIMENT/TIME/ with its options, log, events and figures; wandb where asked."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from sparsessm import files
from sparsessm.errors import InputError, SparseSSMError, StorageError, check_interrupted, first_line, storage_reason, storing
from sparsessm.runs.journal import FOLDER as JOURNAL
from sparsessm.runs.journal import remove_journal
from sparsessm.runs.page import Page
from sparsessm.runs.progress import LogBesideBar, Progress, doing

logger = logging.getLogger("sparsessm")

_REMEDY = "free some space, and resume the run"


class Run:
    """The folder of one run, its log, its progress bar, and its wandb run if there is one."""

    def __init__(
        self, options: Mapping[str, Any], *, log_wandb: bool = False, resumed: Path | None = None, is_main: bool = True
    ) -> None:
        """Opens a new folder for the options, or that of the interrupted run `resumed`; removed again if that fails.

        is_main: False in all processes but the first: they write nothing, and have no folder unless it is resumed.

        Raises:
            InputError: the folder cannot be made or written, another process has it, or wandb cannot start.
        """
        self.started = time.monotonic()
        self.is_main, self.folder = is_main, resumed
        self._progress: Progress | None = None
        self._handlers: list[logging.Handler] = []
        self._page: Page | None = None
        self._lock: FileLock | None = None
        logger.setLevel(logging.INFO if is_main else logging.ERROR)
        if not is_main:
            return
        made: list[Path] = []
        if resumed is None:
            self.folder, made = _new_folder(Path(options["base_dir"]).expanduser() / options["experiment_name"])
        try:
            self._open(options, log_wandb)
        except BaseException as error:
            self.close(failed=True)
            if resumed is None:
                shutil.rmtree(self._mine, ignore_errors=True)
                files.remove_empty(made)
            reason = storage_reason(error) if isinstance(error, OSError) and not isinstance(error, SparseSSMError) else None
            if reason is not None:
                place = f"the run folder {self.folder}"
                raise StorageError(f"{place} cannot be written ({reason}): choose --base_dir elsewhere") from error
            raise

    @property
    def _mine(self) -> Path:
        """The folder, of a process that has one."""
        assert self.folder is not None
        return self.folder

    def _open(self, options: Mapping[str, Any], log_wandb: bool) -> None:
        self._lock = files.lock(self._mine / ".lock")
        if self._lock is None:
            raise StorageError(f"{self.folder}: another process is working on this run: wait until it ends")
        log = self._mine / "output.log"
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        self._handlers = [_LogFile(log, encoding="utf-8"), LogBesideBar()]
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
        self.write_json("options.json", options)
        if log_wandb:
            self._page = Page(options, self._mine)

    def write_json(self, name: str, content: Any) -> None:
        """Writes a file of the run folder, whole or not at all."""
        if self.is_main:
            text = files.strict_json(content, indent=2) + "\n"
            self._write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes a safetensors file of the run folder, whole or not at all; no file for no tensors."""
        if self.is_main and tensors:
            self._write(name, lambda path: save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path))

    def _write(self, name: str, write: Any) -> None:
        with storing(str(self._mine / name), _REMEDY):
            files.write_whole(self._mine / name, write, follow=False)

    def event(self, kind: str, **fields: Any) -> None:
        """Appends a line to events.jsonl: the kind, seconds since the start, and the fields."""
        if not self.is_main:
            return
        line = {"event": kind, "seconds": round(time.monotonic() - self.started, 3), **fields}
        with storing(str(self._mine / "events.jsonl"), _REMEDY):
            files.append_line(self._mine / "events.jsonl", files.strict_json(line))

    def expect(self, layers: int) -> None:
        """Says how many layers, of all phases together, will be reported."""
        self._progress = Progress(layers, "layer", logger.info, shown=self.is_main)

    def report(self, phase: str, layer: int, **figures: float) -> None:
        """Notes a finished layer: an event, a step of the progress bar, a row on wandb."""
        check_interrupted()
        if self._progress is not None:
            self._progress.advance()
            self._progress.show(doing(phase, layer), ", ".join(f"{name}={value:.4g}" for name, value in figures.items()))
        if figures:
            self.event("layer", phase=phase, layer=layer, **figures)
            if self._page is not None:
                self._page.row(phase, layer, figures)

    def finish(self, metrics: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Writes metrics.json, and then hands the figures, and a checkpoint where there is one, to wandb."""
        self.write_json("metrics.json", metrics)
        self.event("finished")
        if self._page is not None:
            self._page.finish(metrics, checkpoint)

    def failed(self, error: BaseException) -> None:
        """Writes the traceback of what ended the run to its log, and nowhere else."""
        for handler in self._handlers:
            if isinstance(handler, _LogFile):
                text = "".join(traceback.format_exception(error))
                with suppress(StorageError):
                    handler.emit(logging.makeLogRecord({"msg": text, "levelno": logging.ERROR}))

    def close(self, failed: bool = False) -> None:
        """Closes the log and the bar, releases the folder, and ends the wandb run."""
        if self._progress is not None:
            self._progress.close()
        if self._page is not None:
            self._page.close(failed)
        for handler in self._handlers:
            logger.removeHandler(handler)
            with suppress(OSError):
                handler.close()
        if self._lock is not None:
            files.unlock(self._lock)
            self._lock = None


class _LogFile(logging.FileHandler):
    """A log that says when it cannot be written, instead of a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        error = sys.exc_info()[1]
        assert error is not None  # it is being handled
        raise StorageError(
            f"{self.baseFilename} could not be written ({storage_reason(error) or first_line(error)}): {_REMEDY}"
        ) from error


def _new_folder(parent: Path) -> tuple[Path, list[Path]]:
    """A folder named after the time, and which of its parents are new; of two runs in one second, the later gets a number.

    Journals that a kill left in finished runs beside it are removed.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        made = files.made_parents(parent)
        for sibling in parent.glob(f"*/{JOURNAL}"):
            if (sibling.parent / "metrics.json").is_file():
                remove_journal(sibling.parent)
        for number in range(1000):
            folder = parent / (f"{stamp}-{number}" if number else stamp)
            with suppress(FileExistsError):
                folder.mkdir()
                return folder, made
    except OSError as error:
        raise StorageError(f"no run folder under {parent} ({storage_reason(error)}): choose --base_dir elsewhere") from None
    raise InputError(f"no free name for a run under {parent}: choose another --experiment_name")
