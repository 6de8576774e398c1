"""Several threads for compiled code: torch's own.

The OpenMP threads of torch keep waiting for more work in a loop for about a millisecond after each of its operations.
Threads of another pool would share the processor with them, and take up to twice as long.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def for_each(function: Callable[[Any], object], tasks: Iterable[Any], threads: int) -> None:
    """function(task) of each task, by this number of threads, including this one.

    The function should spend its time without the interpreter's lock. Its first error is raised when all have stopped.
    """
    left = iter(tasks)
    errors: list[BaseException] = []

    def work(_: object = None) -> None:
        try:
            for task in left:
                if errors:
                    return
                function(task)
        except BaseException as error:  # raised below, in the thread that waits for all
            errors.append(error)

    if threads <= 1:
        work()
    elif (team := _team(os.getpid())) is not None:
        team(_CALLBACK(work), None, threads, 0)
    else:
        others = [_pool(os.getpid(), threads).submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


@functools.cache
def _team(process: int) -> Callable[..., None] | None:
    """`GOMP_parallel` of the OpenMP library that torch computes with; None if it uses another one, or after a fork."""
    library = _loaded() if process == _FIRST_PROCESS else None
    return None if library is None else ctypes.CDLL(library).GOMP_parallel


def _loaded() -> str | None:
    """The file of the GNU OpenMP library in this process; of several, the one that came with torch."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = sorted({line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line})
    with_torch = [path for path in paths if str(Path(torch.__file__).parent) in path]
    candidates = paths if len(paths) == 1 else with_torch
    return candidates[0] if len(candidates) == 1 else None


_FIRST_PROCESS = os.getpid()


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork: each process has its own."""
    return ThreadPoolExecutor(threads - 1)
