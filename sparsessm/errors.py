"""Every error that the command names: one hierarchy, one line each, and the exit codes.

Whatever a user, a file, a disk, a network, a number or a signal can cause is raised as one of these where it arises. Any
other exception that reaches the command is a bug.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

BUG, UNUSABLE, INTERRUPTED = 1, 2, 130  # exit codes

# Errors of the system that mean that the disk is full.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SparseSSMError(Exception):
    """An expected error. The message is one line that says what to do; the command prints it and exits with 2."""


class InputError(SparseSSMError, ValueError):
    """What the user gave, or what it names, is unusable."""


class StorageError(InputError):
    """Files cannot be written, or the disk is full."""


class NumericalError(SparseSSMError, ArithmeticError):
    """A computation has no result; the message names the layer or the parameter."""


class DivergenceError(NumericalError):
    """A layer outputs values that are not finite."""


class SolverError(NumericalError):
    """A Hessian that stays indefinite however much it is damped."""


class MemoryLimitError(SparseSSMError):
    """The memory of the machine or of the device is used up."""


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP, which the message names; no library's `except Exception` holds it up."""


def first_line(error: BaseException) -> str:
    """An error in one line, its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full, also where only the message of a library says so."""
    code = error.errno if isinstance(error, OSError) else None
    return code in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


def storage_reason(error: BaseException) -> str | None:
    """Why the system refused to write, None where the error is of another kind.

    torch, safetensors, pyarrow and tokenizers wrap the system's error in their own, so the message is read as well.
    """
    if is_disk_full(error):
        return f"the disk is full: {first_line(error)}"
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    wrapped = any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos", "I/O error"))
    return first_line(error) if wrapped else None


@contextmanager
def storing(what: str, remedy: str = "free some space, or name another place") -> Iterator[None]:
    """Makes an error of the disk a StorageError: "WHAT could not be written (the disk is full): free ..."."""
    try:
        yield
    except SparseSSMError:
        raise
    except Exception as error:
        reason = storage_reason(error)
        if reason is None:
            raise
        raise StorageError(f"{what} could not be written ({reason}): {remedy}") from error


_interrupted: str | None = None  # by which signal


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Turns SIGINT, SIGTERM and SIGHUP into a KeyboardInterrupt for a while; a second Ctrl-C ends the process at once."""
    global _interrupted
    _interrupted = None

    def end(number: int, _: object) -> None:
        global _interrupted
        _interrupted = signal.Signals(number).name
        for other in before:
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
        raise Interrupted(_interrupted)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_interrupted() -> None:
    """Raises Interrupted if a signal arrived where it could not end the run (in a callback from compiled code)."""
    if _interrupted:
        raise Interrupted(_interrupted)


def require_known(what: str, name: str | None, table: Collection[str]) -> None:
    """Refuses a name that its table does not hold.

    Raises:
        ValueError: naming what is known.
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}, known are {', '.join(table)}")


def ending_in_one_line(function: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A script's `main` whose named errors, and signals, end in one line and their exit code."""

    @functools.wraps(function)
    def main(argv: Sequence[str]) -> int:
        with ending_by_signals():
            try:
                return function(argv)
            except SparseSSMError as error:
                print(f"error: {error}", file=sys.stderr)
                return UNUSABLE
            except Interrupted as error:
                print(f"stopped by {error}; the same command continues", file=sys.stderr)
                return 128 + signal.Signals[str(error)]  # as a shell has it

    return main
