"""Damaged copies of files: what transmission, failing disks and ill will make of them.

Every mutant follows from its seed alone.
"""

import random
import struct
from collections.abc import Callable

HEADER_BYTES = 512
_HUGE = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Mutation = Callable[[random.Random, bytearray], None]


def mutant(data: bytes, seed: int) -> bytes:
    """A copy with one to three kinds of damage."""
    rng = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if len(damaged) > 16:
            rng.choice(MUTATIONS)(rng, damaged)
    return bytes(damaged)


def _flip_in_header(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(min(HEADER_BYTES, len(data)))
        data[place] ^= 1 << rng.randrange(8)


def _flip_in_body(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.randint(1, 64)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(1, len(data)) :]


def _zero(rng: random.Random, data: bytearray) -> None:
    start, length = _span(rng, data)
    data[start : start + length] = bytes(length)


def _swap(rng: random.Random, data: bytearray) -> None:
    (first, length), (second, _) = sorted((_span(rng, data), _span(rng, data)))
    length = min(length, second - first, len(data) - second)
    one, other = data[first : first + length], data[second : second + length]
    data[first : first + length], data[second : second + length] = other, one


def _duplicate(rng: random.Random, data: bytearray) -> None:
    start, length = _span(rng, data)
    data[start:start] = data[start : start + length]


def _overwrite_word(rng: random.Random, data: bytearray) -> None:
    """A word near the beginning or end, where headers and directories are, becomes extreme."""
    size, code = rng.choice(((2, "H"), (4, "I")))
    reach = min(4096, len(data) - size)
    place = rng.randrange(reach)
    place = place if rng.random() < 0.6 else len(data) - size - place
    order = rng.choice("<>")
    struct.pack_into(order + code, data, place, rng.choice(_HUGE) & (2 ** (8 * size) - 1))


def _damage_tiff_tag(rng: random.Random, data: bytearray) -> None:
    """Type, count or value of one tag of one directory; other files are damaged elsewhere."""
    directories = _directories(data)
    if not directories:
        return _overwrite_word(rng, data)
    offset, num_tags = rng.choice(directories)
    place = offset + 2 + 12 * rng.randrange(max(1, num_tags))
    field, code = rng.choice(((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "I"), (8, "H")))
    if place + 12 <= len(data):
        limit = 2 ** (8 * struct.calcsize(code)) - 1
        value = rng.choice((*_HUGE, rng.randrange(len(data)), rng.randrange(1, 600)))
        struct.pack_into(f"<{code}", data, place + field, value & limit)
    return None


def _loop_directories(rng: random.Random, data: bytearray) -> None:
    """A directory names an earlier one, itself or a random place as the next."""
    directories = _directories(data)
    if not directories:
        return _overwrite_word(rng, data)
    offset, num_tags = rng.choice(directories)
    target = rng.choice((offset, directories[0][0], rng.randrange(len(data))))
    if offset + 6 + 12 * num_tags <= len(data):
        struct.pack_into("<I", data, offset + 2 + 12 * num_tags, target)
    return None


MUTATIONS: tuple[Mutation, ...] = (
    _flip_in_header,
    _flip_in_body,
    _truncate,
    _zero,
    _swap,
    _duplicate,
    _overwrite_word,
    _damage_tiff_tag,
    _damage_tiff_tag,
    _loop_directories,
)


def _span(rng: random.Random, data: bytearray) -> tuple[int, int]:
    length = min(len(data) - 1, rng.choice((4, 16, 64, 512, 4096)))
    return rng.randrange(len(data) - length), length


def _directories(data: bytearray) -> list[tuple[int, int]]:
    """Offset and number of tags of each directory, if this is classic little-endian TIFF."""
    found: list[tuple[int, int]] = []
    if data[:4] != b"II*\0":
        return found
    (offset,) = struct.unpack_from("<I", data, 4)
    while offset and offset + 2 <= len(data) and len(found) < 32:
        (num_tags,) = struct.unpack_from("<H", data, offset)
        end = offset + 2 + 12 * num_tags
        if end + 4 > len(data) or any(offset == place for place, _ in found):
            break
        found.append((offset, num_tags))
        (offset,) = struct.unpack_from("<I", data, end)
    return found
