"""Several processes on one job, as `torchrun` starts them; alone, everything here does nothing.

Each takes its share of the windows, in whole batches, and sums are added up in float64: the batches that are computed
together are the same however many processes there are, and so are the masks.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sparsessm.errors import InputError, first_line

# What a launcher sets, all of it, for a job of several processes.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(minutes=30)  # for the other processes, to come and at every sum
_SILENCE = 15.0  # seconds of waiting before a message says for whom


def launched() -> tuple[int, int]:
    """This process's rank and how many there are, as the launcher's variables say.

    If only one or two are set, left by an earlier launcher, they are ignored.

    Raises:
        InputError: all are set, and are not valid numbers.
    """
    if not all(os.environ.get(name) for name in _VARIABLES):
        return 0, 1
    try:
        rank, world, local, port = (int(os.environ[name]) for name in _VARIABLES if name != "MASTER_ADDR")
    except ValueError:
        rank = world = local = port = -1
    if not (0 <= rank < world and local >= 0 and 0 < port < 1 << 16):
        values = " ".join(f"{name}={os.environ[name]}" for name in _VARIABLES)
        raise InputError(f"the variables of a launcher make no sense ({values}): unset them, or start by torchrun")
    return rank, world


def start(device: torch.device) -> torch.device:
    """Joins the job if a launcher started this process; returns the device that this process computes on.

    Raises:
        InputError: the variables of a launcher are set and its other processes do not come, or there is no such GPU.
    """
    _, world = launched()
    if world == 1:
        return device
    if device.type == "cuda" and device.index is None:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(f"LOCAL_RANK is {local}, and there are {torch.cuda.device_count()} GPUs: start fewer processes")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = threading.Timer(
        _SILENCE, print, (f"waiting at {meeting} for all {world} processes of WORLD_SIZE",), {"file": sys.stderr}
    )
    waiting.daemon = True
    waiting.start()
    try:
        # sums of figures are on the CPU also where layers compute on GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    except Exception as error:  # of sockets, stores and backends: they share no base class
        raise InputError(
            f"the {world} processes of this job did not meet at {meeting} ({first_line(error)}): start them all, or unset "
            "RANK and WORLD_SIZE"
        ) from error
    finally:
        waiting.cancel()
    return device


def stop() -> None:
    """Leaves the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes and logs."""
    return rank() == 0


def share(windows: Tensor, batch: int) -> Tensor:
    """This process's windows of (n,L): every world-th batch."""
    if not dist.is_initialized():
        return windows
    mine = windows.split(batch)[rank() :: count()]
    return torch.cat(mine) if mine else windows[:0]


def batch_number(mine: int) -> int:
    """The number among all batches of one of this process's, see `share`."""
    return mine * count() + rank()


def all_sum(*sums: Tensor) -> None:
    """Replaces each tensor by its sum over all processes."""
    if dist.is_initialized():
        for tensor in sums:
            dist.all_reduce(tensor)


def largest(number: int) -> int:
    """The largest of the numbers of all processes."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather_text(text: str) -> list[str]:
    """One text from each process, by rank."""
    if not dist.is_initialized():
        return [text]
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def barrier() -> None:
    """Waits until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_process_works() -> Iterator[bool]:
    """Yields whether this is the process that works alone; the others wait for it at the end of the block.

    They wait in a separate group with a long timeout: that of the job's group is 10 to 30 minutes.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(weeks=1)) if dist.is_initialized() else None
    yield is_main()
    if group is not None:
        dist.barrier(group=group)
