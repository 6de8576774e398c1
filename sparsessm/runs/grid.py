"""Many runs of the command as one job: finished runs are not repeated, interrupted ones resume, a failure stops nothing.

A cell is one run. Its runs lie under BASE_DIR/NAME/, where NAME follows from its options, so that every table and sweep
that asks for the same run finds it there. The run folders are the only memory of a job: a cell is done when one of them
holds metrics.json and the cell's options.

Beside the run folders lie console.log, what the last run said, and .lock. The lock belongs to the run itself: where the
job was killed and its run lives on, the next job waits for that run instead of starting it twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sparsessm import files
from sparsessm.commandline import Parser, parse
from sparsessm.corpora.names import DATASETS, with_full_path
from sparsessm.errors import UNUSABLE, InputError, ending_by_signals
from sparsessm.options import DEFAULTS, PLACES, Options, without_own
from sparsessm.runs.progress import Progress

COMMAND = (sys.executable, "-P", "-m", "sparsessm")  # -P: not a folder of that name where the job was started
_PACKAGES = Path(__file__).resolve().parents[2]

_LOOK = 0.2  # seconds between two looks at the runs, and for which a worker waits for another job's run
# How a run is asked to end, and for how many seconds it is waited for: an interrupt lets it close its log.
_ENDING = ((signal.SIGINT, 5.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 60.0))
_HELD = "a run of another job holds the cell"


def parser(about: str) -> Parser:
    """The scripts' parser, with the arguments that they share: --seeds, --workers, --devices, --base_dir and --out."""
    made = Parser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--seeds", nargs="+", type=int, help="repeat each run; the table shows mean and deviation")
    made.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    made.add_argument("--devices", nargs="+", help="GPUs that the workers take in turn (default: all there are)")
    made.add_argument("--base_dir", type=Path, default=Path("experiments"), help="folder of all run folders")
    made.add_argument("--out", type=Path, help="folder for the results (default: one in BASE_DIR)")
    return made


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
            self.options  # noqa: B018  (it is parsed, and kept)
        except InputError as error:
            return str(error)
        return None

    @cached_property
    def options(self) -> Options:
        return parse(self.argv)[0]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings, as in options.json: all options but the paths."""
        return json.loads(json.dumps(self.options.settings))

    @cached_property
    def name(self) -> str:
        """The experiment's name: model, method, and a digest of every setting that is not the default.

        Defaults are left out, so that a new flag of a later version does not change the names of older runs.
        """
        changed = {key: value for key, value in self.settings.items() if value != DEFAULTS[key]}
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:10]
        model = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(self.options.model).name)
        return f"{model}-{self.options.method or 'dense'}-{digest}"

    def command(self, base_dir: Path) -> list[str]:
        """The arguments that start this run from the beginning."""
        return [*self.argv, "--base_dir", str(base_dir), "--experiment_name", self.name]


# The name of a model, or of a text; a local folder by its full path, so that it means the same from everywhere.
resolved_model = partial(with_full_path, reserved=("demo",))
resolved_dataset = partial(with_full_path, reserved=(*DATASETS, "none"))


def finished(cell: Cell, base_dir: Path) -> Path | None:
    """The newest finished run of a cell, or None."""
    return next((folder for folder in _runs(cell, base_dir) if (folder / "metrics.json").is_file()), None)


def interrupted(cell: Cell, base_dir: Path) -> Path | None:
    """The newest run of a cell that was interrupted and that this version can resume, or None."""
    runs = _runs(cell, base_dir)
    return next((folder for folder, record in runs.items() if record.keys() == DEFAULTS.keys()), None)


def fill(
    cells: Sequence[Cell], base_dir: Path, *, workers: int = 1, devices: Sequence[str] | None = None, group: str = ""
) -> dict[Cell, str]:
    """Runs the cells that are not finished; returns those that failed, each with its reason in one line.

    Args:
        workers: runs at a time. devices: CUDA_VISIBLE_DEVICES for the first worker, the second, and so on around; None
        takes the GPUs that are there. Without any, workers share the cores. group: the runs' group on wandb, where
        WANDB_RUN_GROUP does not say otherwise.

    Raises:
        Interrupted: by a signal, when no run is left alive; the next call continues them.
        InputError: base_dir cannot be written, or there cannot be that many workers.
    """
    if workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}")
    if devices is None:
        import torch  # here, so that commands that run nothing need not wait for it

        devices = device_names(torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    job = _Job(Path(base_dir), [environment(worker, workers, devices, group) for worker in range(workers)])
    able = {cell.name: cell for cell in cells if not cell.refusal}  # two tables may ask for the same run
    to_do = [cell for cell in able.values() if not finished(cell, job.base_dir)]
    failed: dict[str, str] = {}  # by the cells' names
    say = partial(print, file=sys.stderr, flush=True)
    progress = Progress(len(able), "run", say, done=len(able) - len(to_do), leave=True)
    with ending_by_signals(), ThreadPoolExecutor(workers) as pool, progress:
        try:
            pending = {pool.submit(job.fill, cell): cell for cell in to_do}
            while pending:
                for future in wait(pending, _LOOK, FIRST_COMPLETED).done:
                    cell, reason = pending.pop(future), future.result()
                    if reason == _HELD:
                        pending[pool.submit(job.fill, cell)] = cell
                        continue
                    if reason:
                        failed[cell.name] = reason
                    progress.advance()
                now = "; ".join(job.running) or ("waiting for a run of another job" if pending else "")
                progress.show(now, f"{len(failed)} failed" if failed else "")
        finally:
            job.stopping.set()
    reasons = {cell: cell.refusal or failed.get(cell.name) for cell in cells}
    return {cell: reason for cell, reason in reasons.items() if reason}


def environment(worker: int, workers: int, devices: Sequence[str], group: str | None) -> dict[str, str]:
    """The variables of a worker's runs: its device, or its share of the cores; the group on wandb; this package."""
    variables = dict(os.environ)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_PACKAGES), variables.get("PYTHONPATH")]))
    if devices:
        variables["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]
    else:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // workers)))
    if group:
        variables.setdefault("WANDB_RUN_GROUP", group)
    return variables


@dataclass
class _Job:
    """What the threads of one call of `fill` share; each waits for a run.

    Attributes:
        free: the variables of workers without a run. running: labels of the cells whose runs live. stopping: once it is
        set, each thread ends its run and starts no other.
    """

    base_dir: Path
    free: list[dict[str, str]]
    running: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def fill(self, cell: Cell) -> str | None:
        """Runs a cell unless it is done; returns why there are no figures, None where there are.

        Raises:
            InputError: its folder cannot be written.
        """
        folder, handed = self.base_dir / cell.name, list[int]()
        if self.stopping.is_set():
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = files.lock(folder / ".lock", wait=_LOOK, on_acquired=handed.append)
        except OSError as error:
            raise InputError(f"cannot write under {folder} ({error.strerror}): choose --base_dir elsewhere") from None
        if lock is None:
            return _HELD
        code, variables = None, self.free.pop()

        def ended() -> bool:
            return self.stopping.is_set() or finished(cell, self.base_dir) is not None

        try:
            broken_off = interrupted(cell, self.base_dir)
            if broken_off and not ended():
                code = self._run(cell, ["--resume", str(broken_off)], variables, handed)
            # it refuses to resume where the model, the text or the settings changed since
            if code in (None, UNUSABLE) and not ended():
                code = self._run(cell, cell.command(self.base_dir), variables, handed)
        finally:
            self.free.append(variables)
            lock.release()
        if ended():
            return None
        console = folder / "console.log"
        said = (console.read_text(errors="replace").strip() or "it said nothing").splitlines()[-1].strip()
        if code == 0:
            said = "it ended, but not with the options that it was asked for: was the program changed meanwhile?"
        return f"{said} (exit code {code}; {console})"

    def _run(self, cell: Cell, argv: Sequence[str], variables: dict[str, str], handed: Sequence[int]) -> int | None:
        """Runs the command to its end, or ends it where the job is stopping; returns its exit code."""
        with (self.base_dir / cell.name / "console.log").open("wb") as console:
            process = subprocess.Popen(
                [*COMMAND, *argv], stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, env=variables,
                pass_fds=handed,  # the run holds the lock for as long as it lives, longer than this job maybe
            )  # fmt: skip
        self.running.append(cell.label)
        while process.poll() is None and not self.stopping.wait(_LOOK):
            pass
        for number, patience in _ENDING if self.stopping.is_set() else ():
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        self.running.remove(cell.label)
        return process.returncode


def _runs(cell: Cell, base_dir: Path) -> dict[Path, dict[str, Any]]:
    """Run folders with a cell's options, the one started last first, and what their options.json says."""
    found = []
    for file in (base_dir / cell.name).glob("*/options.json"):
        try:
            started, record = file.stat().st_mtime, json.loads(file.read_text())
            known = without_own(DEFAULTS | record)  # a flag that an older version did not have does nothing by its default
        except (OSError, ValueError, TypeError):
            continue
        if {name: value for name, value in known.items() if name not in PLACES} == without_own(cell.settings):
            found.append((started, file.parent, record))
    return {folder: record for _, folder, record in sorted(found, key=lambda run: run[0], reverse=True)}


def device_names(count: int, visible: str | None) -> list[str]:
    """The GPUs that torch sees, as CUDA_VISIBLE_DEVICES calls them: what it says already (visible), else 0, 1, ..."""
    return (visible.split(",") if visible else [str(i) for i in range(count)])[:count]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
