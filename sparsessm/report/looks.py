"""How runs are named and drawn: a method and its variants look the same in every picture.

Nothing is shown by colour alone: series differ in marker and dash as well, and have their names. The hues are chosen to
keep apart under the three colour blindnesses, and each has a contrast of 3 or more on its ground (tests/report).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsessm.options import DEFAULTS, PLACES
from sparsessm.report.results import Record
from sparsessm.report.wording import grouped, number_text, percent_text, short_names

# By colour index; the last is for series that are not methods. In page.css they are --s0 to --s6, and others in dark mode.
COLOURS = ("#1b66e0", "#cb741b", "#0f9a5c", "#451090", "#5e4a0c", "#700f35", "#66717b")

# Shares are drawn in this one hue, more of it for more pruned: it stands on both grounds.
HEAT = "#2b7de0"

# Of matplotlib: circle, square, diamond, triangles, pentagon, cross, hexagon. Dashes are in points.
MARKERS = "osD^vpXh"
DASHES = ((), (4.5, 2.2), (1.5, 1.9), (6.0, 2.2, 1.5, 2.2))

# Options that make no other curve: paths and speed, what an axis or a chart stands for, and the seed, which is averaged.
_NO_VARIANT = frozenset(
    "model method sparsity prunen prunem prune_A prune_layers seqlen seed data_dir ppl_datasets raw_zeros device "
    "calib_batch save_format".split()
).union(PLACES)
_NO_VARIANT_PREFIXES = ("eval_", "zero_shot_")

# Options that the masks of A_log do not depend on: they come before the weights.
_OF_WEIGHTS = frozenset(("alpha", "target_modules", "module", "conv_hessian"))


@dataclass(frozen=True)
class Style:
    """How a series is drawn: indices into the colours, markers and dashes; hollow markers for variants."""

    colour: int
    marker: int
    dash: int = 0
    hollow: bool = False


# A family of methods shares a colour; its members differ in marker and dash.
METHOD_STYLES = {
    "sparsessm": Style(0, 0), "ts_semi": Style(0, 4, 1), "structure_ts": Style(0, 3, 2),
    "magnitude": Style(1, 1), "mag_semi": Style(1, 4, 1), "structure_mag": Style(1, 3, 2),
    "sparsessm_dev": Style(2, 2), "sparsessm_obs": Style(3, 4), "ts_real": Style(3, 3, 1),
    "sparsegpt": Style(4, 5), "gpt_extend": Style(4, 5, 1), "ghost": Style(4, 6, 2),
    "wanda": Style(5, 6), "mamba-shedder": Style(5, 7, 3), "dense": Style(6, 7),
}  # fmt: skip


def method_style(method: str, variant: int = 0) -> Style:
    """The style of a method; variant: which of its variants."""
    number = zlib.crc32(method.encode())  # a method that is not in the table: the same look in every report
    style = METHOD_STYLES.get(method) or Style(number % 6, number // 6 % len(MARKERS), 3)
    marker, dash = (style.marker + variant) % len(MARKERS), (style.dash + variant) % len(DASHES)
    return Style(style.colour, marker, dash, hollow=variant % 2 == 1)


def plain_style(index: int) -> Style:
    """Styles for series that are not methods."""
    return Style(index % 6, index % len(MARKERS), index % len(DASHES))


class Looks:
    """Labels and styles of the runs of one report.

    A label is a method, and those of its options that are not the default and in which its runs on a model differ.

    Attributes:
        styles: by label. models, sets: short names of the models and of the data sets.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.models = short_names(record.model for record in records)
        self.sets = short_names(name for record in records for name in record.metrics["perplexity"])
        comparable = grouped(((record.method, record.model), record) for record in records)
        self._differing = {both: _differing(mine) for both, mine in comparable.items()}
        labels = grouped(sorted({(r.method, self.label(r, of_masks)) for r in records for of_masks in (False, True)}))
        self.styles = {label: method_style(one, i) for one, mine in labels.items() for i, label in enumerate(mine)}

    def words(self, record: Record, of_masks: bool = False) -> list[str]:
        """What a label names beside the method: N:M, and options; of_masks: those that change the masks of A_log."""
        ignored = _OF_WEIGHTS if of_masks or "weights" not in record.parts else ()
        names = [name for name in self._differing[record.method, record.model] if name not in ignored]
        chosen = [(name, record.options.get(name)) for name in names]
        pattern = [record.pattern or ""] if record.options["prunem"] else []
        return pattern + [_option_words(name, value) for name, value in chosen if value != DEFAULTS.get(name)]

    def label(self, record: Record, of_masks: bool = False) -> str:
        return ", ".join([record.method, *self.words(record, of_masks)])

    def style(self, record: Record) -> Style:
        return self.styles[self.label(record)]

    def run(self, record: Record) -> str:
        """A run in a few words: method, what it pruned, how much of it, what its label names, and a seed but 0."""
        if not record.parts:
            return record.method
        share = "" if record.sparsity is None else f" {percent_text(record.sparsity)}"
        seed = [f"seed {record.options['seed']}"] if record.options["seed"] else []
        return ", ".join([record.method, f"{' + '.join(record.parts)}{share}", *self.words(record), *seed])


def _differing(records: Sequence[Record]) -> list[str]:
    """Options in which runs of one method differ."""
    names = dict.fromkeys(name for record in records for name in record.options if name not in _NO_VARIANT)
    found = {name: {repr(record.options.get(name)) for record in records} for name in names}
    return [name for name, values in found.items() if len(values) > 1 and not name.startswith(_NO_VARIANT_PREFIXES)]


def _option_words(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, (int, float)):
        return f"{name} {number_text(value)}"
    if name == "dataset":
        return f"{name} {Path(str(value)).name}"
    return f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
