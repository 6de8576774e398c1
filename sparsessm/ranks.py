"""Several processes on one job, as `torchrun` starts them; alone, everything here does nothing.

Each takes its share of the windows, in whole batches, and sums are added up in float64: the batches that are computed
together are the same however many processes there are, and so are the masks.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> torch.device:
    """Joins the job if torchrun started this process; returns the device that this process computes on."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leaves the job."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes and logs."""
    return rank() == 0


def share(windows: Tensor, batch: int) -> Tensor:
    """This process's windows of (n,L): every world-th batch."""
    if not dist.is_initialized():
        return windows
    mine = windows.split(batch)[rank() :: dist.get_world_size()]
    return torch.cat(mine) if mine else windows[:0]


def all_sum(*sums: Tensor) -> None:
    """Replaces each tensor by its sum over all processes."""
    if dist.is_initialized():
        for tensor in sums:
            dist.all_reduce(tensor)


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
