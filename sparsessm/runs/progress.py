"""How far a run, or a job of runs, is: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

# What the phases of a run do.
_DOES = {
    "ssm": "pruning A_log", "sensitivity": "measuring sensitivities", "layers": "pruning weights",
    "allocation": "measuring errors", "importance": "measuring importance", "steps": "measuring costs",
    "compensated": "pruning and compensating", "shed": "trying removals", "blocks": "tuning blocks",
    "recovery": "tuning the model", "eval": "evaluating",
}  # fmt: skip
EVERY = 60.0  # seconds between two lines

# What is done now comes last: it is what a narrow terminal cuts off.
_BAR = "{n_fmt} of {total_fmt} {unit}s |{bar:20}| {elapsed}, {remaining} left{postfix}  {desc}"
_LINE = "{n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} left{postfix}: {desc}"


def doing(phase: str, layer: int) -> str:
    """What a run does, in a few words."""
    return f"{_DOES[phase]}, layer {layer}"


class Progress:
    """Counts what is finished; shown on a terminal as a bar, otherwise as a line for every minute."""

    def __init__(
        self, total: int, unit: str, say: Callable[[str], object], *, done: int = 0, leave: bool = False, shown: bool = True
    ) -> None:
        """A count of `unit`s, `done` of them before this started.

        Args:
            say: takes the lines. leave: the bar stays when it is closed. shown: False in all processes but the first.
        """
        self.done, self._say, self._shown = done, say, shown
        self._about = {"total": total, "initial": done, "unit": unit}
        self._started = self._said = time.monotonic()
        self._bar = tqdm(
            **self._about, disable=None if shown else True, leave=leave, smoothing=0, dynamic_ncols=True, bar_format=_BAR
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self) -> None:
        self.done += 1
        self._bar.update()

    def show(self, now: str, more: str = "") -> None:
        """now: what is done at present. more: what else there is to say."""
        if not self._bar.disable:
            self._bar.set_postfix_str(more, refresh=False)
            self._bar.set_description_str(now)
        elif self._shown and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            took = self._said - self._started
            self._say(tqdm.format_meter(self.done, elapsed=took, prefix=now, postfix=more, bar_format=_LINE, **self._about))

    def close(self) -> None:
        self._bar.close()


class LogBesideBar(logging.StreamHandler[Any]):
    """Writes lines to stderr; a bar that is there moves below them."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
