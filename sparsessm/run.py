"""One run: the options are checked, the steps are done, and every error becomes one line."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from sparsessm.commandline import program
from sparsessm.corpora import text
from sparsessm.errors import (
    BUG,
    INTERRUPTED,
    UNUSABLE,
    InputError,
    MemoryLimitError,
    SparseSSMError,
    StorageError,
    first_line,
    is_disk_full,
)
from sparsessm.layerwise import distributed, memory
from sparsessm.metrics import zero_shot
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.hub import check_hub
from sparsessm.models.place import check_target
from sparsessm.options import Options
from sparsessm.procedure.fitness import check_model
from sparsessm.rehearsal import rehearse
from sparsessm.report.tables import row, text_table
from sparsessm.runs.journal import Journal, remove_journal
from sparsessm.runs.page import check_wandb
from sparsessm.runs.tracking import Run
from sparsessm.steps import Steps

logger = logging.getLogger("sparsessm")


def command(chosen: Options, resumed: Path | None) -> int:
    """Executes the command; returns the exit code, with one line of reason for any but 0."""
    is_main = True
    try:
        is_main = distributed.launched()[0] == 0
        if chosen.dry_run:
            if is_main:
                print(rehearse(chosen, *_checked(chosen, resumed)))
            return 0
        metrics = run(chosen, resumed)
    except SparseSSMError as error:
        return _said(f"error: {error}", error, UNUSABLE, is_main)
    except KeyboardInterrupt as error:
        return _said("interrupted", error, INTERRUPTED, is_main)
    except Exception as error:
        where = getattr(error, "__notes__", None) or ["no run was started"]
        print(f"error: a bug in sparsessm ({type(error).__name__}: {first_line(error)}); {where[-1]}", file=sys.stderr)
        return BUG
    if is_main:
        print(text_table([row(chosen, metrics)]))
    return 0


def _said(line: str, error: BaseException, code: int, is_main: bool) -> int:
    if is_main:
        print(": ".join([line, *getattr(error, "__notes__", [])[-1:]]), file=sys.stderr)
    return code


def run(chosen: Options, resumed: Path | None = None) -> dict[str, Any]:
    """One run from options to its row; returns what metrics.json holds.

    Args:
        resumed: the folder of an interrupted run with these options, to be resumed.

    Raises:
        SparseSSMError: any expected error; errors that the user can correct are raised before the model is loaded where
            possible. Once the run folder exists, its notes say how to resume where that helps.
    """
    source, first, stop, device = _checked(chosen, resumed)
    tasks = {}
    if chosen.eval_zero_shot:
        tasks = zero_shot.load_tasks(chosen.zero_shot_tasks, chosen.zero_shot_include)
    torch.manual_seed(chosen.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    device = distributed.start(device)
    is_main = distributed.is_main()
    job, failed = None, True
    log = None
    try:
        log = Run(dataclasses.asdict(chosen), log_wandb=chosen.log_wandb, resumed=resumed, is_main=is_main)
        folder = Path(distributed.gather_text(str(log.folder))[0])
        journal = Journal(folder, writes=is_main)
        distributed.barrier()  # every process has read the journal before the first writes to it
        journal.confirm("options", chosen.settings, "options.json")
        job = Steps(chosen, log, journal, folder, source, device, tasks)
        with _limits_named(folder):
            metrics = job.measure(first, stop)
        failed = False
        return metrics
    except BaseException as error:
        if log is not None and log.folder is not None and log.folder.is_dir():
            log.failed(error)
            again = f"resume it by: {program()} --resume {shlex.quote(str(log.folder))}"
            if isinstance(error, (KeyboardInterrupt, StorageError, MemoryLimitError)):
                error.add_note(again)
            elif not isinstance(error, SparseSSMError):
                error.add_note(f"its traceback is in {log.folder / 'output.log'}; please report it; {again}")
        raise
    finally:
        if job is not None:
            job.close()
        if log is not None:
            log.close(failed)
        distributed.stop()


def _checked(chosen: Options, resumed: Path | None) -> tuple[checkpoint.Source, int, int, torch.device]:
    """All that can be checked before the model is loaded; the model's files, the range of layers, and the device.

    Raises:
        InputError: one line that says what to do.
    """
    if resumed is not None and (resumed / "metrics.json").is_file():
        remove_journal(resumed)
        raise InputError(f"--resume {resumed} has finished: its figures are in metrics.json")
    memory.keep_freed()
    _quiet()
    device = memory.device_named(chosen.device)
    source = checkpoint.find(chosen.model)
    first, stop = check_model(chosen, Layout(checkpoint.skeleton(source)))
    if chosen.method:
        text.check_dataset(chosen.dataset, chosen.data_dir, calibration=True)
    for name in chosen.evaluation_sets:
        text.check_dataset(name, chosen.data_dir, calibration=False)
    if chosen.save:
        runs = Path(chosen.base_dir) / chosen.experiment_name
        own = Journal(resumed, writes=False).load_figures("saved", lambda stamp: isinstance(stamp, str))
        check_target(chosen.save, source.folder, overwrite=chosen.overwrite, runs=runs, own=own)
    if chosen.push_to_hub is not None:
        check_hub(chosen.push_to_hub, chosen.private)
    if chosen.log_wandb:
        check_wandb()
    return source, first, stop, device


def _quiet() -> None:
    """Keeps the libraries' progress bars and notices out of the log."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@contextmanager
def _limits_named(folder: Path) -> Iterator[None]:
    """Turns the error of an allocator, or of a full disk, into a named one."""
    try:
        yield
    except SparseSSMError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if is_disk_full(error):
            where = f"the disk of {folder} or of the temporary files"
            raise StorageError(f"{where} is full ({first_line(error)}): free some space") from error
        known = ("out of memory", "not enough memory", "allocate memory")
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in known):
            raise
        raise MemoryLimitError(
            f"the memory is used up ({first_line(error)[:160]}): lower --calib_batch and --eval_batch, or give "
            "--offload disk and --memory_budget 0"
        ) from error
