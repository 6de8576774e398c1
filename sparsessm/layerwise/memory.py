"""Which device computes, where the residual stream is stored, and how much memory may be spent to save work."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from sparsessm.errors import InputError, require_known
from sparsessm.layerwise.pinned import PinnedTensor

# Where the residual stream may be kept.
_PLACES = ("device", "cpu", "disk")

# Share of the free memory that kept activations may take where --memory_budget says nothing.
_FREE_SHARE = 0.4

# What glibc's mallopt calls its settings, and their values here in bytes.
_MALLOC_SETTINGS = {"M_MMAP_THRESHOLD": (-3, 64 << 20), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


def keep_freed() -> None:
    """Lets the process keep tensors' memory for the next ones, up to 2 GiB, where the C library is glibc.

    By default it gives back what is above 32 MiB or at the end of the heap, and the system clears it page by page when it
    is asked for again: of pruning a layer on the CPU that is a tenth of the time.
    """
    if platform.libc_ver()[0] == "glibc":
        for setting, value in _MALLOC_SETTINGS.values():
            ctypes.CDLL(None).mallopt(setting, value)


def device_named(name: str) -> torch.device:
    """The device of a name, "auto" for the first GPU if there is one.

    Raises:
        InputError: torch cannot use it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name} is not available here: use cpu, or a device that torch sees") from None
    return device


def placement(device: torch.device, offload: str, gib: float | None) -> dict[str, Any]:
    """What Stream.embed takes for --offload (device, cpu or disk) and --memory_budget (GiB, None for the default)."""
    require_known("offload", offload, _PLACES)
    where = device if offload == "device" else offload
    return {"device": device, "offload": where, "budget": None if gib is None else int(gib * 2**30)}


def default_budget(device: torch.device) -> int:
    """A share of the memory that is free on the device now, in bytes."""
    return int(_FREE_SHARE * (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()))


def _available() -> int:
    """Main memory that is available without swapping; where the system does not say, half of what it has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the peak of the process since it began, and of the device's allocator."""
    peak = {"process": _own_peak()}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


_highest = 0  # Linux counts pages in batches for each thread, so that its figure of the peak can fall a little


def _own_peak() -> int:
    """Bytes. What getrusage says begins, on Linux, with the size of the process that started this one."""
    global _highest
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    _highest = max(_highest, peak)
    return _highest


Stored = Union[Tensor, "DiskTensor", PinnedTensor]


def allocate(
    shape: tuple[int, int, int], dtype: torch.dtype, place: torch.device | str, folder: str | Path | None = None,
    device: torch.device | None = None,
) -> Stored:  # fmt: skip
    """A tensor of any content on a device or, for the place "disk", in a file in the folder.

    device: where it is read and written; for a GPU main memory is pinned.

    Raises:
        InputError: the disk is too full.
    """
    if place == "disk":
        return DiskTensor(shape, dtype, folder)
    if device is not None and device.type == "cuda" and torch.device(place).type == "cpu":
        return PinnedTensor(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=place)


class DiskTensor:
    """A tensor (n,L,M) in a file that vanishes with the process; read and written a slice of rows and steps at a time.

    Plain reads and writes: pages of a mapped file would count as memory of the process for as long as it is mapped.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, folder: str | Path | None = None) -> None:
        self.shape, self.dtype, self.folder = shape, dtype, folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open as long as the tensor is there)
        self._step = shape[2] * torch.empty(0, dtype=dtype).element_size()  # bytes of one time step
        try:
            if math.prod(shape):
                os.posix_fallocate(self._file.fileno(), 0, math.prod(shape[:2]) * self._step)
        except OSError as error:
            raise InputError(f"--offload disk: the disk is too full for the block inputs ({error.strerror})") from None

    def _offset(self, row: int, step: int) -> int:
        return (row * self.shape[1] + step) * self._step

    def _bounds(self, where: tuple[slice, slice]) -> list[tuple[int, int, int]]:
        return [part.indices(size) for part, size in zip(where, self.shape, strict=False)]

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        (first, stop, _), (start, end, _) = self._bounds(where)
        out = torch.empty(stop - first, end - start, self.shape[2], dtype=self.dtype)
        for i in range(stop - first):
            os.preadv(self._file.fileno(), [out[i].view(torch.uint8).numpy().data], self._offset(first + i, start))
        return out

    def __setitem__(self, where: tuple[slice, slice], value: Tensor) -> None:
        (first, stop, _), (start, _, _) = self._bounds(where)
        value = value.detach().cpu().contiguous()
        for i in range(stop - first):
            os.pwritev(self._file.fileno(), [value[i].view(torch.uint8).numpy().data], self._offset(first + i, start))
