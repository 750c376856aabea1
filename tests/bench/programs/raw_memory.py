"""Memory that both processes map: ``python -m tests.bench.programs.raw_memory target|initiator``.

A copy from it is the limit for all that share memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

from tests.bench.programs.transfer import REGION, address_of, drive, fill, private, serve, target


def lend() -> None:
    memory = os.memfd_create("bench")
    os.ftruncate(memory, REGION)
    fill(mmap.mmap(memory, REGION))
    serve({"path": f"/proc/{os.getpid()}/fd/{memory}"})


def take() -> None:
    memory = os.open(target()["path"], os.O_RDWR)
    theirs, ours = mmap.mmap(memory, REGION, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), private()
    source, destination = address_of(theirs), address_of(ours)

    def copy(places: tuple[int, int, int]) -> None:
        ctypes.memmove(*places)

    drive(ours, lambda offset, length: (destination + offset, source + offset, length), copy)


if __name__ == "__main__":
    {"target": lend, "initiator": take}[sys.argv[1]]()
