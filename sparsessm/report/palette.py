"""Colours, markers and dashes of the pictures: a method looks the same wherever it is drawn.

Nothing is shown by colour alone: series differ in marker and dash as well, and have their names. The hues are chosen to
keep apart under the three colour blindnesses, and each has a contrast of 3 or more on its ground (tests/report).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

# By colour index; the last is for series that are not methods. DARK stands on the dark ground.
LIGHT = ("#1b66e0", "#cb741b", "#0f9a5c", "#451090", "#5e4a0c", "#700f35", "#66717b")
DARK = ("#4a80c4", "#e08a3e", "#3fe39a", "#9650ea", "#ecd02f", "#d8345f", "#a9b4bf")

# Shares are drawn in this one hue, more of it for more pruned: it stands on both grounds.
HEAT = "#2b7de0"

MARKERS = ("circle", "square", "diamond", "triangle", "point-down", "pentagon", "cross", "hexagon")

# Lengths of strokes and gaps in pixels; none is a solid line.
DASHES = ((), (6.0, 3.0), (2.0, 2.5), (8.0, 3.0, 2.0, 3.0))


@dataclass(frozen=True)
class Style:
    """How a series is drawn: indices into the colours, markers and dashes; hollow markers for variants."""

    colour: int
    marker: int
    dash: int = 0
    hollow: bool = False


DENSE = Style(6, 7)

# A family of methods shares a colour; its members differ in marker and dash.
METHOD_STYLES = {
    "dense": DENSE,
    "magnitude": Style(1, 1),
    "sparsessm": Style(0, 0),
    "sparsessm_dev": Style(2, 2),
    "ts_real": Style(3, 3, 1),
    "ts_semi": Style(0, 4, 1),
    "mag_semi": Style(1, 4, 1),
    "structure_ts": Style(0, 3, 2),
    "structure_mag": Style(1, 3, 2),
    "gpt_extend": Style(4, 5, 1),
    "sparsegpt": Style(4, 5),
    "wanda": Style(5, 6),
    "sparsessm_obs": Style(3, 4),
    "mamba-shedder": Style(5, 7, 3),
}


def method_style(method: str, variant: int = 0) -> Style:
    """The style of a method; variant: which of several series of that method in one picture."""
    style = METHOD_STYLES.get(method)
    if style is None:  # a method that is not in the table: the same look in every report
        number = zlib.crc32(method.encode())
        style = Style(number % 6, number // 6 % len(MARKERS), 3)
    if not variant:
        return style
    marker, dash = (style.marker + variant) % len(MARKERS), (style.dash + variant) % len(DASHES)
    return Style(style.colour, marker, dash, hollow=variant % 2 == 1)


def plain_style(index: int) -> Style:
    """Styles for series that are not methods."""
    return Style(index % 6, index % len(MARKERS), index % len(DASHES))
