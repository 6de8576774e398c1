"""Many runs of the command as one job: finished runs are not repeated, interrupted ones resume, a failure stops nothing.

A cell is one run. Its runs lie under BASE_DIR/NAME/, where NAME follows from its options, so that every table and sweep
that asks for the same run finds it there. The run folders are the only memory of a job: a cell is done when one of them
holds metrics.json and the cell's options.

Beside the run folders lie console.log, what the last run said, and .lock. The lock belongs to the run itself: where the
job was killed and its run lives on, the next job waits for that run instead of starting it twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from tqdm import tqdm

from sparsessm import options
from sparsessm.commandline import parse
from sparsessm.corpora.names import DATASETS, with_full_path
from sparsessm.errors import InputError
from sparsessm.options import Options

MAIN = Path(__file__).resolve().parent.parent.parent / "main.py"

_POLL = 0.05  # seconds between two looks at the running children
# How a run is asked to end, and for how many seconds it is waited for: an interrupt lets it close its log.
_ENDING = ((signal.SIGINT, 5.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 60.0))


class Stopped(Exception):
    """The job was told to stop by a signal; its runs have been ended, and the next call continues them."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number  # as a shell has it


class Parser(argparse.ArgumentParser):
    """The scripts' parser: a mistake in their arguments is an InputError, one line like any other."""

    def __init__(self, about: str) -> None:
        super().__init__(
            description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@dataclass(frozen=True)
class Cell:
    """One run of the command.

    Attributes:
        label: a name for people. argv: MODEL, DATASET and flags as main.py takes them, without places.
    """

    label: str
    argv: tuple[str, ...]

    @cached_property
    def refusal(self) -> str | None:
        """Why main.py would refuse argv, or None; where it would, the properties below raise InputError."""
        try:
            parse(self.argv)
        except InputError as error:
            return str(error)
        return None

    @cached_property
    def options(self) -> Options:
        return parse(self.argv)[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings, as in options.json: all options but the paths."""
        return _settings(dataclasses.asdict(self.options))

    @cached_property
    def name(self) -> str:
        """The experiment's name: model, method, and a digest of every setting that is not the default.

        Defaults are left out, so that a new flag of a later version does not change the names of older runs.
        """
        defaults = _defaults()
        changed = {key: value for key, value in self.settings.items() if value != defaults[key]}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:10]
        model = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(self.options.model).name)
        return f"{model}-{self.options.method or 'dense'}-{digest}"

    def command(self, base_dir: Path) -> list[str]:
        """The arguments that start this run from the beginning."""
        return [*self.argv, "--base_dir", str(base_dir), "--experiment_name", self.name]


def resolved(name: str, *, reserved: Sequence[str] = ()) -> str:
    """The name of a model or data set; a local folder by its full path, so that it means the same from everywhere."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if name not in reserved and folder.is_dir() else name


def resolved_model(name: str) -> str:
    return resolved(name, reserved=("demo",))


def resolved_dataset(name: str) -> str:
    return with_full_path(name, reserved=(*DATASETS, "none"))


def finished(cell: Cell, base_dir: Path) -> Path | None:
    """The newest finished run of a cell, or None."""
    runs = _runs(cell, base_dir)
    return next((folder for folder, _ in runs if (folder / "metrics.json").is_file()), None)


def interrupted(cell: Cell, base_dir: Path) -> Path | None:
    """The newest run of a cell that was interrupted and that this version can resume, or None."""
    known = {spec.name for spec in dataclasses.fields(Options)}
    return next((folder for folder, record in _runs(cell, base_dir) if record.keys() == known), None)


def fill(
    cells: Iterable[Cell],
    base_dir: Path,
    *,
    workers: int = 1,
    devices: Sequence[str] | None = None,
    group: str | None = None,
) -> dict[Cell, str]:
    """Runs the cells that are not finished; returns those that failed, each with its reason in one line.

    Args:
        workers: runs at a time.
        devices: CUDA_VISIBLE_DEVICES for the first worker, the second, and so on around; None takes
            the GPUs that are there. Without any, workers share the cores.
        group: the runs' group on wandb, where WANDB_RUN_GROUP does not say otherwise.

    Raises:
        Stopped: after SIGINT, SIGTERM or SIGHUP, when no run is left alive.
        InputError: where base_dir cannot be written, or workers is not a number of workers.
    """
    if workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}")
    if devices is None:
        import torch  # here, so that commands that run nothing need not wait for it

        devices = device_names(torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return _Job(list(cells), Path(base_dir), workers, devices, group).run()


def environment(worker: int, workers: int, devices: Sequence[str], group: str | None) -> dict[str, str]:
    """The variables of a worker's runs: its device, or its share of the cores; the group on wandb."""
    variables = dict(os.environ)
    if devices:
        variables["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]
    else:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // workers)))
    if group:
        variables.setdefault("WANDB_RUN_GROUP", group)
    return variables


@dataclass
class _Child:
    """A run under way."""

    cell: Cell
    resumed: bool
    process: subprocess.Popen[bytes]
    lock: BinaryIO
    console: Path


class _Job:
    """The queue of one call of `fill`, and the run of each worker."""

    def __init__(
        self, cells: Sequence[Cell], base_dir: Path, workers: int, devices: Sequence[str], group: str | None
    ) -> None:
        self.base_dir, self.workers = base_dir, workers
        self.environments = [environment(i, workers, devices, group) for i in range(workers)]
        self.refused = {cell: cell.refusal for cell in cells if cell.refusal}
        self.able = [cell for cell in cells if cell not in self.refused]
        self.queue = deque({cell.name: cell for cell in self.able}.values())  # two tables may ask for the same run
        self.running: dict[int, _Child] = {}
        self.failed: dict[str, str] = {}  # by the cells' names
        self.stale: set[str] = set()  # names of cells whose interrupted run could not be resumed
        self.signal: int | None = None
        self.said = ""
        # no bar without a terminal
        self.bar = tqdm(total=len(self.queue), unit="cell", disable=not sys.stderr.isatty())

    def run(self) -> dict[Cell, str]:
        with self.bar, self._signals():
            try:
                while (self.queue or self.running) and self.signal is None:
                    for worker in range(self.workers):
                        if worker in self.running:
                            self._collect(worker)
                        if worker not in self.running:
                            self._start_next(worker)
                    time.sleep(_POLL if self.queue or self.running else 0)
            finally:
                self._end_all()
        if self.signal is not None:
            raise Stopped(self.signal)
        return self.refused | {cell: self.failed[cell.name] for cell in self.able if cell.name in self.failed}

    def _start_next(self, worker: int) -> None:
        """Starts the first cell that is neither done nor held by a run of another job."""
        for _ in range(len(self.queue)):
            cell = self.queue.popleft()
            lock = self._lock(cell)
            if lock is None:
                self.queue.append(cell)
            elif finished(cell, self.base_dir):
                lock.close()
                self._advance()
            else:
                self.running[worker] = self._start(cell, lock, self.environments[worker])
                return
        if self.queue and not self.running:
            self._say("waiting for a run of another job")

    def _lock(self, cell: Cell) -> BinaryIO | None:
        """The cell's lock, or None while another job's run holds it."""
        folder = self.base_dir / cell.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("ab")
        except OSError as error:
            raise InputError(f"cannot write under {folder} ({error.strerror}): choose --base_dir elsewhere") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError:
            pass  # a file system without locks: users must then not start two jobs at once
        return lock

    def _start(self, cell: Cell, lock: BinaryIO, variables: dict[str, str]) -> _Child:
        self._say(cell.label)
        broken_off = None if cell.name in self.stale else interrupted(cell, self.base_dir)
        argv = ["--resume", str(broken_off)] if broken_off else cell.command(self.base_dir)
        console = self.base_dir / cell.name / "console.log"
        with console.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, str(MAIN), *argv],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=variables,
                pass_fds=(lock.fileno(),),  # the run holds the lock for as long as it lives, longer than this job maybe
            )  # fmt: skip
        return _Child(cell, broken_off is not None, process, lock, console)

    def _collect(self, worker: int) -> None:
        """Takes note of a run that has ended."""
        child = self.running[worker]
        code = child.process.poll()
        if code is None:
            return
        del self.running[worker]
        child.lock.close()
        if finished(child.cell, self.base_dir):
            self._advance()
        elif code == 2 and child.resumed:
            # the model, text or settings changed since the interruption: it is started from the beginning
            self.stale.add(child.cell.name)
            self.queue.appendleft(child.cell)
        else:
            said = _last_words(child.console)
            if code == 0:
                said = "it ended, but not with the options that it was asked for: was the program changed meanwhile?"
            self.failed[child.cell.name] = f"{said} (exit code {code}; {child.console})"
            self._advance()

    def _say(self, what: str) -> None:
        """Shows the present state before the bar."""
        if what != self.said:
            self.said = what
            self.bar.set_description_str(what)

    def _advance(self) -> None:
        self.bar.set_postfix(failed=len(self.failed), refresh=False)
        self.bar.update()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Notes a signal for the loop to see, rather than break into the start of a run; those ignored stay so."""

        def note(number: int, _: Any) -> None:
            self.signal = number

        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_all(self) -> None:
        for number, patience in _ENDING:
            alive = [child.process for child in self.running.values() if child.process.poll() is None]
            for process in alive:
                process.send_signal(number)
            deadline = time.monotonic() + patience
            while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
                time.sleep(_POLL)
        for child in self.running.values():
            child.lock.close()
        self.running.clear()


def _runs(cell: Cell, base_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Run folders with a cell's options, the one started last first, and what their options.json says."""
    found = []
    for file in (base_dir / cell.name).glob("*/options.json"):
        try:
            record, started = json.loads(file.read_text()), file.stat().st_mtime
        except (OSError, ValueError):
            continue
        # an older version had fewer flags: a flag it did not know does nothing by its default
        if isinstance(record, dict) and _settings(_defaults() | record) == cell.settings:
            found.append((started, file.parent, record))
    return [(folder, record) for _, folder, record in sorted(found, key=lambda run: run[0], reverse=True)]


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in json.loads(json.dumps(values)).items() if key not in options.PLACES}


def _defaults() -> dict[str, Any]:
    """The default of every option, as JSON has it."""
    return json.loads(json.dumps({spec.name: spec.default for spec in dataclasses.fields(Options)}))


def _last_words(console: Path) -> str:
    """The last line of a run's output, which gives the reason."""
    lines = [line for line in console.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def device_names(count: int, visible: str | None) -> list[str]:
    """The GPUs that torch sees, as CUDA_VISIBLE_DEVICES calls them: what it says already (visible), else 0, 1, ..."""
    if count and visible:
        return visible.split(",")[:count]
    return [str(i) for i in range(count)]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
