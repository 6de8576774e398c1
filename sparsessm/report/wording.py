"""How figures and names read in a report: numbers as short text, paths by as much of their end as tells them apart."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")


def figure_text(value: float) -> str:
    """A perplexity, or another figure of a table: 67.68, and 2.31e+07 where most digits would mean nothing."""
    return f"{round(value, 2) + 0.0:.2f}" if abs(value) < 1e5 else f"{value:.2e}"  # + 0.0: no minus before a zero


def percent_text(share: float, digits: int = 1) -> str:
    """50 %, 33.3 %: no more decimals than needed, at most `digits`."""
    return f"{round(100 * share, digits):g} %" if math.isfinite(share) else "not a number"


def bytes_text(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def number_text(value: float) -> str:
    """A number as a tick or a label: 0.04, 1200, 4e+06."""
    return f"{value:.4g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def clipped(text: str, length: int) -> str:
    """At most `length` characters that can be printed, the last an ellipsis where some are left out."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each name -> its last parts (of a path), as many as it takes to differ from the others; hub ids stay whole."""
    names = list(dict.fromkeys(names))

    def short(name: str) -> str:
        if not name.startswith(("/", ".", "~")) and name.count("/") <= 1:
            return name
        parts = [part for part in name.split("/") if part not in ("", ".")]
        others = [f"/{other.rstrip('/')}" for other in names if other != name]
        tails = ("/".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        return next((tail for tail in tails if not any(other.endswith(f"/{tail}") for other in others)), name)

    return {name: short(name) for name in names}


def slug(text: str) -> str:
    """A name for a file or an anchor."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower()[:80] or "unnamed"


def grouped(pairs: Iterable[tuple[_Key, _Item]]) -> dict[_Key, list[_Item]]:
    """The items of each key, both in the order in which they came."""
    found: dict[_Key, list[_Item]] = {}
    for key, item in pairs:
        found.setdefault(key, []).append(item)
    return found
