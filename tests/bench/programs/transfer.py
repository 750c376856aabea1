"""The two ends of a transfer bench: a target that lends its memory, and an initiator that reads it and keeps the time.

Standard library only: every peer's Python runs it. The target prints its address as a line of JSON and stays until its
input ends. The initiator is driven line by line: ``read:SIZE N`` moves N times SIZE bytes from the target,
``copy:SIZE N`` does the same within the initiator by memcpy; the answer is a line of JSON with the seconds of each.

The rules are the same for all: every page of every buffer was written before; one transfer is under way at a time; each
takes other bytes than those before it, in steps through the whole region, so neither side has them in a cache; what can
be prepared before a transfer is prepared before the clock starts; and what arrived is compared, byte for byte.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

REGION: Final = 256 * 2**20
"""Bytes of the target's region, and of the initiator's."""
_PART: Final = 16 * 2**20
_SEED: Final = 20
STEPS: Final = {4 * 2**10: 2**18, 64 * 2**10: 2**19}
"""Bytes from one transfer of a size to the next; larger ones follow each other without a gap."""

# Libraries that print would speak between the answers: from here on their output goes to standard error.
_ANSWERS: Final = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

Prepared = TypeVar("Prepared")

_memcmp: Final = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def private() -> mmap.mmap:
    """A region's length of private memory, in pages of the usual size, all of them written."""
    memory = mmap.mmap(-1, REGION, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ctypes.memset(address_of(memory), 0, REGION)
    return memory


def address_of(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def fill(memory: mmap.mmap | memoryview) -> None:
    """Writes the bytes that the initiator expects. None repeat, so a wrong offset shows."""
    generator = random.Random(_SEED)
    for begin in range(0, REGION, _PART):
        memory[begin : begin + _PART] = generator.randbytes(_PART)


def serve(address: Any) -> None:
    """Tells the address, and stays until the input ends."""
    _ANSWERS.write("ready\n" + json.dumps(address) + "\n")
    sys.stdin.read()


def target() -> Any:
    """The target's address, which the initiator was started with."""
    return json.loads(os.environ["BENCH_URL"])


def drive(
    destination: mmap.mmap | memoryview, prepare: Callable[[int, int], Prepared], read: Callable[[Prepared], object]
) -> None:
    """Serves commands until the input ends.

    Args:
        destination: where what is read arrives, each byte at the offset it has in the target.
        prepare: of an offset and a length; gives what a transfer of them needs.
        read: returns once all bytes are there.

    Raises:
        ValueError: other bytes arrived than the target has.
    """
    expected, copied = private(), private()
    fill(expected)
    into, source, aside = address_of(destination), address_of(expected), address_of(copied)
    positions: dict[str, int] = {}

    def memcpy(places: tuple[int, int, int]) -> None:
        ctypes.memmove(*places)

    def timed(act: Callable[[Any], object], prepared: list[Any]) -> list[float]:
        seconds: list[float] = []
        for one in prepared:
            began = time.perf_counter()
            act(one)
            seconds.append(time.perf_counter() - began)
        return seconds

    _ANSWERS.write("ready\n")
    while line := sys.stdin.readline():
        command, count = line.split()
        kind, size = command.split(":")[0], int(command.split(":")[1])
        step = STEPS.get(size, size)
        first = positions.get(command, 0)
        positions[command] = first + int(count)
        offsets = [(first + turn) * step % (REGION - REGION % step) for turn in range(int(count))]
        if kind == "copy":
            seconds = timed(memcpy, [(aside + offset, source + offset, size) for offset in offsets])
        else:
            seconds = timed(read, [prepare(offset, size) for offset in offsets])
            for offset in offsets:
                if _memcmp(into + offset, source + offset, size):
                    raise ValueError(f"{size} bytes from offset {offset} on are not the target's")
            for offset in offsets:
                ctypes.memset(into + offset, 0, size)
        _ANSWERS.write(json.dumps(seconds) + "\n")
