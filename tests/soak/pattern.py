"""Bytes that say where they come from: the owner, its life, the region, its generation, and the offset.

A word of eight bytes is its index in the region (four bytes, little-endian), and the tag (four bytes). So each word is
unlike all others that there ever are in a soak, and a wrong byte, a wrong offset, an old life or a mix of two
generations shows.
"""

from __future__ import annotations

import ctypes
import struct
from collections import OrderedDict
from typing import Final, NamedTuple

SIZE: Final = 4 * 2**20 + 4096
"""Bytes of a region."""
WORD: Final = 8
SHORT: Final = 2 * WORD - 1
"""Fewer bytes than this may have no whole word, and so no tag that could be read from them."""
GENERATIONS: Final = 2**14
LIVES: Final = 2**8
_KEPT: Final = 24
_WORD: Final = struct.Struct("<II")

_memcmp: Final = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Tag(NamedTuple):
    """Whose bytes these are. Of one region, what was written later compares as greater."""

    owner: int
    region: int
    life: int
    generation: int

    def number(self) -> int:
        return self.owner << 26 | self.region << 22 | (self.life % LIVES) << 14 | self.generation % GENERATIONS

    @classmethod
    def of(cls, number: int) -> Tag:
        return cls(number >> 26, number >> 22 & 15, number >> 14 & 255, number & (GENERATIONS - 1))


def address_of(memory: memoryview | bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Patterns:
    """Whole regions as they ought to be; the last few are kept."""

    def __init__(self) -> None:
        plain = bytearray(SIZE)
        words = SIZE // WORD
        for byte in range(3):
            plain[byte::WORD] = bytes((index >> 8 * byte) & 255 for index in range(words))
        self._plain: Final = plain
        self._kept: OrderedDict[Tag, bytearray] = OrderedDict()

    def whole(self, tag: Tag) -> bytearray:
        """A region of this tag."""
        found = self._kept.get(tag)
        if found is None:
            found = bytearray(self._plain)
            number = tag.number().to_bytes(4, "little")
            for byte in range(4):
                found[4 + byte :: WORD] = number[byte : byte + 1] * (SIZE // WORD)
            self._kept[tag] = found
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(tag)
        return found

    def matches(self, data: memoryview, tag: Tag, offset: int) -> bool:
        """Whether these are the bytes from *offset* on of a region of this tag."""
        return not _memcmp(address_of(data), address_of(self.whole(tag)) + offset, len(data))


def tag_in(data: memoryview, offset: int) -> Tag | None:
    """What the first whole word says; None where there is none, or it is not the word of its place.

    Args:
        offset: of the first byte, in the region.
    """
    skipped = -offset % WORD
    if skipped + WORD > len(data):
        return None
    index, number = _WORD.unpack_from(data, skipped)
    return Tag.of(number) if index == (offset + skipped) // WORD else None
