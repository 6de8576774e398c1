"""How runs are named and drawn: a method, and each set of options in which its runs differ, looks the same all over a page.

Nothing is shown by colour alone: series differ in marker and dash as well, and have their names. The hues are chosen to
keep apart under the three colour blindnesses, and each has a contrast of 3 or more on its ground (tests/report).
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsessm.options import PLACES
from sparsessm.report.results import DEFAULTS, Record
from sparsessm.report.wording import number_text, percent_text

# By colour index; the last is for what is not a method. DARK stands on the dark ground.
LIGHT = ("#1b66e0", "#cb741b", "#0f9a5c", "#451090", "#5e4a0c", "#700f35", "#66717b")
DARK = ("#4a80c4", "#e08a3e", "#3fe39a", "#9650ea", "#ecd02f", "#d8345f", "#a9b4bf")

# The names of matplotlib; lengths of strokes and gaps in points, none is a solid line.
MARKERS = ("o", "s", "D", "^", "v", "p", "X", "h")
DASHES = ((), (4.5, 2.2), (1.5, 1.9), (6.0, 2.2, 1.5, 2.2))

# Options that do not make another variant: those shown in another way, those of speed, and the seed, which is averaged.
_NO_VARIANT = frozenset(
    "model method sparsity prunen prunem prune_A prune_layers seqlen seed data_dir ppl_datasets raw_zeros device "
    "calib_batch".split()
)
_NO_VARIANT_PREFIXES = ("eval_", "zero_shot_")
_OF_WEIGHTS = frozenset(("alpha", "target_modules", "module", "conv_hessian"))  # the masks of A_log come before them


@dataclass(frozen=True)
class Style:
    """How a series is drawn: indices into the colours, markers and dashes; hollow markers for variants."""

    colour: int
    marker: int
    dash: int = 0
    hollow: bool = False


# A family of methods shares a colour; its members differ in marker and dash.
METHOD_STYLES = {
    "dense": Style(6, 7), "magnitude": Style(1, 1), "sparsessm": Style(0, 0), "sparsessm_dev": Style(2, 2),
    "ts_real": Style(3, 3, 1), "ts_semi": Style(0, 4, 1), "mag_semi": Style(1, 4, 1), "structure_ts": Style(0, 3, 2),
    "structure_mag": Style(1, 3, 2), "ghost": Style(2, 6, 1), "gpt_extend": Style(4, 5, 1), "sparsegpt": Style(4, 5),
    "wanda": Style(5, 6), "sparsessm_obs": Style(3, 4), "mamba-shedder": Style(5, 7, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """options: (name, words) of what differs from other runs of the method and from the default."""

    method: str
    options: tuple[tuple[str, str], ...]
    style: Style

    def label(self, without: frozenset[str] = frozenset()) -> str:
        return ", ".join([self.method, *(words for name, words in self.options if name not in without)])

    def label_of_masks(self) -> str:
        """Without the options that change no mask of A_log."""
        return self.label(_OF_WEIGHTS)

    @property
    def others(self) -> str:
        """The options that have no place of their own in a table."""
        return ", ".join(words for name, words in self.options if name not in ("alpha", "prunem"))


def variants(records: Sequence[Record]) -> dict[str, Variant]:
    """The variant of each run, by the run's name; runs of other models, or that prune other parts, are not compared."""
    groups: dict[str, dict[tuple[str, tuple[str, ...]], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record.method][record.model, record.parts].append(record)
    found: dict[str, Variant] = {}
    for method, by_parts in groups.items():
        options = {
            record.name: _options(record, group, _NO_VARIANT if "weights" in parts else _NO_VARIANT | _OF_WEIGHTS)
            for (_, parts), group in by_parts.items() for record in group
        }  # fmt: skip
        order = sorted(set(options.values()))
        found |= {name: Variant(method, mine, method_style(method, order.index(mine))) for name, mine in options.items()}
    return found


def method_style(method: str, variant: int = 0) -> Style:
    """The style of a method; variant: which of several sets of options of that method."""
    number = zlib.crc32(method.encode())  # of a method that is not in the table: the same look in every report
    style = METHOD_STYLES.get(method, Style(number % 6, number // 6 % len(MARKERS), 3))
    if not variant:
        return style
    marker, dash = (style.marker + variant) % len(MARKERS), (style.dash + variant) % len(DASHES)
    return Style(style.colour, marker, dash, hollow=variant % 2 == 1)


def plain_style(index: int) -> Style:
    """Styles for series that are not methods."""
    return Style(index % 6, index % len(MARKERS), index % len(DASHES))


def run_label(record: Record, look: Variant) -> str:
    """A run in a few words: method, what it pruned, how much of it, and what tells it from others of the method."""
    if not record.parts:
        return record.method
    pruned = " + ".join(record.parts) + ("" if record.sparsity is None else f" {percent_text(record.sparsity)}")
    words = [record.method, pruned + (f" {record.pattern}" if record.options.get("prunem") else ""), look.others]
    shown = ("alpha", "seed") if "weights" in record.parts else ("seed",)
    words += [f"{name} {number_text(record.options[name])}" for name in shown if record.options.get(name)]
    return ", ".join(filter(None, words))


def _options(record: Record, group: Sequence[Record], ignored: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """(name, words) of the options in which a run differs from the others and from the default."""
    found = [("prunem", str(record.pattern))] if record.options.get("prunem") and record.parts else []
    for name, value in record.options.items():
        if name in ignored or name in PLACES or name.startswith(_NO_VARIANT_PREFIXES) or value == DEFAULTS.get(name):
            continue
        if any(repr(other.options.get(name)) != repr(value) for other in group):
            shown = number_text(value) if isinstance(value, (int, float)) else value
            shown = ", ".join(map(str, value)) if isinstance(value, list) else shown
            shown = Path(value).name if name == "dataset" else shown
            found.append((name, name if value is True else f"no {name}" if value is False else f"{name} {shown}"))
    return tuple(found)
