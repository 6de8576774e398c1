"""How far a run is: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("sparsessm")

# What the phases of a run do.
_DOES = {
    "ssm": "pruning A_log", "sensitivity": "measuring sensitivities", "layers": "pruning weights",
    "allocation": "measuring errors", "importance": "measuring importance", "steps": "measuring costs",
    "compensated": "pruning and compensating", "shed": "trying removals", "blocks": "tuning blocks",
    "recovery": "tuning the model", "eval": "evaluating",
}  # fmt: skip
_EVERY = 60.0  # seconds between two lines


class Progress:
    """Counts finished layers; shown on a terminal as a bar, otherwise as a line of the log for every minute."""

    def __init__(self, total: int, *, shown: bool = True) -> None:
        """total: layers of all phases together. shown: False in all processes but the first."""
        self.total, self.done = total, 0
        self._shown, self._started, self._said = shown, time.monotonic(), time.monotonic()
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            form = "{desc} {bar} {n_fmt} of {total_fmt} layers, {elapsed} so far, {remaining} left{postfix}"
            self._bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, leave=False)

    def step(self, phase: str, layer: int, figures: dict[str, float]) -> None:
        """Another layer is finished."""
        self.done += 1
        where = f"{_DOES[phase]}, layer {layer}"
        if self._bar is not None:
            self._bar.set_description_str(where, refresh=False)
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
            self._bar.update()
        elif self._shown and (now := time.monotonic()) - self._said >= _EVERY:
            left = (now - self._started) / self.done * max(0, self.total - self.done)
            about = tqdm.format_interval(left)
            logger.info("%s: %d of %d layers, about %s left", where, self.done, self.total, about)
            self._said = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LogBesideBar(logging.StreamHandler[Any]):
    """Writes lines to stderr; a bar that is there moves below them."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
