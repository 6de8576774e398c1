"""A residual stream in main memory for a GPU: copies go their own way beside what the GPU computes."""

from __future__ import annotations

import torch
from torch import Tensor

_Where = tuple[slice, slice]


class PinnedTensor:
    """A tensor (n,L,M) in pinned main memory; parts are read to the GPU and written from it, a slice of rows and steps.

    Copies are queued on a CUDA stream of their own: what computes with a part that is read waits for its copy alone, and a
    part that was asked for ahead is on its way while another is computed. A part is written before it is read again, since
    both go through the same queue.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._host = torch.empty(shape, dtype=dtype, pin_memory=True)
        self._queue = torch.cuda.Stream(device)
        self._ahead: dict[tuple[int, ...], tuple[Tensor, torch.cuda.Event]] = {}

    def ahead(self, where: _Where) -> None:
        """Asks for a part that will be read next but one at the latest."""
        self._ahead[self._key(where)] = self._fetch(where)

    def forget(self) -> None:
        """Drops what was asked for and not read."""
        self._ahead.clear()

    def _key(self, where: _Where) -> tuple[int, ...]:
        return sum((part.indices(size)[:2] for part, size in zip(where, self.shape, strict=False)), ())

    def _fetch(self, where: _Where) -> tuple[Tensor, torch.cuda.Event]:
        first, stop, start, end = self._key(where)
        with torch.cuda.stream(self._queue):
            part = torch.empty(stop - first, end - start, self.shape[2], dtype=self.dtype, device=self.device)
            for i in range(stop - first):  # steps of one row lie side by side: nothing else is copied beside computing
                part[i].copy_(self._host[first + i, start:end], non_blocking=True)
            return part, self._queue.record_event()

    def __getitem__(self, where: _Where) -> Tensor:
        key = self._key(where)
        part, copied = self._ahead.pop(key) if key in self._ahead else self._fetch(where)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(copied)
        part.record_stream(computing)
        return part

    def __setitem__(self, where: _Where, value: Tensor) -> None:
        first, stop, start, end = self._key(where)
        value = value.detach().to(self.device).contiguous()
        self._queue.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._queue):
            for i in range(stop - first):
                self._host[first + i, start:end].copy_(value[i], non_blocking=True)
        value.record_stream(self._queue)
