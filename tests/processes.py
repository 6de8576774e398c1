"""The command in processes of its own, which take signals and share jobs as any others do.

They are forked from one that has imported torch and transformers: each by itself would need seconds for that alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["sparsessm.run", "tests.processes"])


class Command:
    """`python main.py ARGV` that was started; its interface is that of subprocess.Popen."""

    def __init__(self, *argv: object, before: Callable[[], object] | None = None, **environment: str) -> None:
        """before: what the process does first."""
        self._place = tempfile.TemporaryDirectory()
        self._said = [Path(self._place.name, name) for name in ("out", "err")]
        words = list(map(str, argv))
        self._process = _FORKS.Process(target=_run, args=(words, before, environment, self._said), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 120.0) -> tuple[str, str]:
        """What it wrote to stdout and stderr; it is killed, and the test fails, where it does not end in time."""
        self._process.join(timeout)
        if self.returncode is None:
            self.send_signal(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s: {self._said[1].read_text()}")
        out, err = (file.read_text() for file in self._said)
        self._place.cleanup()
        return out, err


def job(count: int, *argv: object) -> tuple[str, str]:
    """What `torchrun --nproc_per_node=COUNT main.py ARGV` writes to stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        Command(*argv, **meeting, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        for rank in range(count)
    ]
    out, err = zip(*(rank.communicate() for rank in ranks), strict=True)
    assert [rank.returncode for rank in ranks] == [0] * count, "".join(err)
    return "".join(out), "".join(err)


def _run(
    argv: list[str], before: Callable[[], object] | None, environment: dict[str, str], said: list[Path]
) -> None:
    from sparsessm.__main__ import main

    os.environ.update(environment)
    os.chdir(ROOT)
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["main.py", *argv]
    if before:
        before()
    sys.exit(main())
