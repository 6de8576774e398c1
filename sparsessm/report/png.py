"""A picture of shares as a PNG file, with nothing but zlib (PNG specification, third edition, sections 5 and 11)."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_LEVELS = 16  # four bits a pixel


def share_png(shares: np.ndarray, colour: str) -> bytes:
    """A PNG of shares from 0 to 1 (rows, columns), a pixel each: one colour, as opaque as the share in 16 steps.

    Args:
        colour: as "#rrggbb".
    """
    height, width = shares.shape
    levels = np.rint(np.clip(shares, 0, 1) * (_LEVELS - 1)).astype(np.uint8)
    levels = np.pad(levels, ((0, 0), (0, width % 2)))  # two pixels a byte
    packed = levels[:, 0::2] << 4 | levels[:, 1::2]
    rows = np.pad(packed, ((0, 0), (1, 0)))  # each row begins with its filter, 0: none
    palette = bytes.fromhex(colour.removeprefix("#")) * _LEVELS
    opacity = bytes(round(255 * level / (_LEVELS - 1)) for level in range(_LEVELS))
    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)  # 4 bits, colour type 3: palette
    pixels = zlib.compress(rows.tobytes(), 9)
    chunks = {b"IHDR": header, b"PLTE": palette, b"tRNS": opacity, b"IDAT": pixels, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks.items())


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
