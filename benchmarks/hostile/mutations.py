"""Seeded damage of bytes: flipped bits, cuts, insertions, duplicates, and other things that happen to files."""

from __future__ import annotations

import random
from collections.abc import Callable

Mutation = Callable[[bytes, random.Random], bytes]


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Return the start and the end of a part, mostly a small one."""
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + int(2 ** rng.uniform(0, 12)))


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_end(data: bytes, rng: random.Random) -> bytes:
    """Cut off the end, as a download that broke off."""
    return data[: rng.randrange(len(data))]


def cut_start(data: bytes, rng: random.Random) -> bytes:
    """Cut off the beginning."""
    return data[rng.randrange(1, len(data)) :]


def delete(data: bytes, rng: random.Random) -> bytes:
    """Delete a part."""
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Insert random bytes."""
    start, end = _span(data, rng)
    return data[:start] + rng.randbytes(end - start) + data[start:]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    """Repeat a part."""
    start, end = _span(data, rng)
    return data[:end] + data[start:end] + data[end:]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Exchange two neighbouring parts."""
    start, end = _span(data, rng)
    middle = (start + end) // 2
    return data[:start] + data[middle:end] + data[start:middle] + data[end:]


def zero(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a part with zeros, as a file system that lost a block."""
    start, end = _span(data, rng)
    return data[:start] + bytes(end - start) + data[end:]


def huge_number(data: bytes, rng: random.Random) -> bytes:
    """Write a huge number somewhere, most often near the beginning, where sizes are."""
    start = min(int(2 ** rng.uniform(0, 10)), len(data))
    number = rng.choice(
        (b"\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x00")
    )
    return data[:start] + number + data[start + len(number) :]


def append(data: bytes, rng: random.Random) -> bytes:
    """Append random bytes, zeros, or the file itself."""
    return data + rng.choice((rng.randbytes(1000), bytes(5000), data))


MUTATIONS: dict[str, Mutation] = {
    function.__name__: function
    for function in (flip_bits, cut_end, cut_start, delete, insert, duplicate, swap, zero, huge_number, append)
}
