"""Odd, damaged and hostile values and bytes, all decided by a random generator."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

ACCEPTED, REFUSED = "accepted", "refused"
"""What became of an input."""

HOSTILE = (
    "<script>alert(1)</script>",
    "</textarea><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "\x1b[2J\x1b]0;owned\x07",
    "\x00\x01\x7f\x9b31m",
    "\u202egnp.exe",
    "{{ 7 * 7 }}{% for x in y %}",
    "$x^2$ \\frac",
    "../../etc/passwd",
    "C:\\con",
    "a\r\nb\u2028c",
    "\ud800",
    "&#x3c;b&#x3e;",
    "é" * 300,
)
_ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**70),
    0.0,
    -0.0,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
)


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """Any value that YAML or JSON can hold."""
    kind = rng.randrange(8)
    if kind < 4 or depth > 2:
        return rng.choice(_ODD)
    if kind == 4:
        return rng.choice(HOSTILE)
    if kind == 5:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {
            rng.choice(("bits", "kind", "x", "1", "train")): odd_value(rng, depth + 1) for _ in range(rng.randrange(4))
        }
    return rng.uniform(-10, 40)


def damaged_values(rng: random.Random, values: Any) -> Any:
    """A tree of plain values with a few of its nodes replaced, removed, renamed or moved."""
    values = copy.deepcopy(values)
    for _ in range(rng.randrange(1, 4)):
        nodes = list(_nodes(values))
        if not nodes:
            return odd_value(rng)
        parent, key = rng.choice(nodes)
        how = rng.randrange(5)
        if how <= 1:
            parent[key] = odd_value(rng)
        elif how == 2:
            del parent[key]
        elif how == 3:
            other, other_key = rng.choice(nodes)
            with contextlib.suppress(KeyError, IndexError):
                parent[key] = copy.deepcopy(other[other_key])
        elif isinstance(parent, dict):
            parent[rng.choice((str(key) + "x", "", *HOSTILE))] = odd_value(rng)
    return values


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with flips, cuts, insertions, repetitions and zeros."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(changed) + 1) if rng.random() < 0.5 else rng.randrange(min(len(changed), 400) + 1)
        how = rng.randrange(6)
        if how == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[place:]
        elif how == 2:
            del changed[place : place + rng.randrange(1, 64)]
        elif how == 3:
            changed[place:place] = rng.randbytes(rng.randrange(1, 32))
        elif how == 4:
            changed[place : place + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7))
        else:
            changed[place:place] = changed[place : place + rng.randrange(1, 200)]
    return bytes(changed)


def _nodes(values: Any) -> Iterator[tuple[Any, Any]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield values, key
        yield from _nodes(value)


class BytesRandom(random.Random):
    """A generator whose choices come from bytes, so that a fuzzer can guide them; zeros after the last one."""

    def __init__(self, data: bytes):
        self._data, self._place = data, 0
        super().__init__(0)

    def getrandbits(self, k: int, /) -> int:
        """The next bits."""
        size = -(-k // 8)
        taken = self._data[self._place : self._place + size].ljust(size, b"\0")
        self._place += size
        return int.from_bytes(taken, "little") >> (8 * size - k)

    def random(self) -> float:
        """Of 53 bits, in [0, 1)."""
        return self.getrandbits(53) / 2**53
