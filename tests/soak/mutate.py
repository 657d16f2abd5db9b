"""Damage to bytes, by chance."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

#: What a number of two or four bytes is replaced by.
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def flipped(data: bytes, bit: int) -> bytes:
    """Return bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def mutated(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return bytes that are damaged in one to four places, half of them near the beginning.

    Args:
        rng: decides.
        data: bytes of a file.
        others: whole files, parts of which may be put in.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        near = rng.choice((32, 512, len(data), len(data)))
        at, n = rng.randrange(min(near, len(data))), rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(8):
            case 0 | 1:
                for _ in range(rng.choice((1, 1, 3, 16))):
                    data = flipped(data, rng.randrange(8 * min(near, len(data))))
            case 2:
                n = rng.choice((2, 4))
                number = rng.choice(_EXTREMES) & (1 << 8 * n) - 1
                data = (
                    data[:at] + number.to_bytes(n, rng.choice(("big", "little"))) + data[at + n :]
                )
            case 3:
                data = data[:at] + rng.randbytes(n) + data[at + n :]
            case 4:
                data = data[:at]
            case 5:
                data = data[:at] + data[at + n :]
            case 6:
                data = data[: at + n] + data[at:]
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other)) if other else 0
                data = data[:at] + other[start : start + n] + data[at + n :]
    return data


def with_checksums(data: bytes) -> bytes:
    """Return a PNG whose chunks have the checksums of what they hold; other bytes as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : end]
        parts += [data[at : at + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        at = end + 4
    return b"".join(parts) + data[at:]
