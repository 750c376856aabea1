"""How processes of one machine know whether a peer's region is still the one that they found: a page of numbers.

    slots   4,096 unsigned 64-bit numbers in the machine's order: a region's epoch while it is registered, else 0
    rows    256 rows of 4,096 bytes, one for each link that writes: a byte is 1 while it writes to that slot's region

Who copies looks at the slot before and after. For a read that is enough: what was read in between is thrown away. A
write would have done its harm by then, so who writes first says so in its row, and then looks; who ends a region clears
the slot, and then waits for those that say so. A row belongs to the open file description that has locked its first
byte. The kernel takes the lock from a process that dies, and so nobody waits for the dead.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
import weakref
from typing import Final

from computemesh.contracts.peers import MEMORY_KEYS_MAX
from computemesh.peer.memory import STRONGLY_ORDERED, Descriptor, Mapping, SharedMemory, fence, reopened

if sys.platform == "linux":
    import fcntl

SLOTS: Final = MEMORY_KEYS_MAX
ROWS: Final = 256
_SLOT_BYTES: Final = 8
_ROWS_AT: Final = SLOTS * _SLOT_BYTES
_PAGE_BYTES: Final = _ROWS_AT + ROWS * SLOTS
_WAIT_STEP_S: Final = 0.0005
_FLOCK: Final = struct.Struct("hhqqi4x")


class Epochs:
    """The page of this process. Its methods may be called from any thread.

    A child made by ``fork`` has the page in common with its parent, and must not change it: there, nothing is put, and
    nothing cleared.
    """

    def __init__(self) -> None:
        self._memory = SharedMemory.allocate(_PAGE_BYTES)
        view = self._memory.view()
        self._slots = view[:_ROWS_AT].cast("Q")
        self._rows = view[_ROWS_AT:]
        self._free = list(range(SLOTS - 1, -1, -1))
        self._pid = os.getpid()

    @property
    def fd(self) -> int:
        """Of the page."""
        return self._memory.fd

    def put(self, epoch: int) -> int | None:
        """The slot that shows this epoch from now on; None when all are in use."""
        if os.getpid() != self._pid:
            return None
        try:
            slot = self._free.pop()
        except IndexError:
            return None
        self._slots[slot] = epoch
        return slot

    def clear(self, slot: int, timeout_s: float) -> bool:
        """Ends it, and waits until nobody writes any more. False when somebody still does; the slot is lost then."""
        if os.getpid() != self._pid:
            return True
        self._slots[slot] = 0
        fence()
        deadline = time.monotonic() + timeout_s
        while any(self._writes(row, slot) for row, busy in enumerate(self._rows[slot::SLOTS].tobytes()) if busy):
            if time.monotonic() > deadline:
                return False
            time.sleep(_WAIT_STEP_S)
        self._free.append(slot)
        return True

    def clear_all(self) -> None:
        """Ends all of them, and waits for nobody."""
        if os.getpid() == self._pid:
            self._slots[:] = memoryview(bytes(_ROWS_AT)).cast("Q")

    def _writes(self, row: int, slot: int) -> bool:
        """Whether somebody has this row, where it says so. Only a dead one's is cleared: the living do it themselves,
        also those that were too late and are about to see it."""
        if not _lock(self.fd, row):
            return True
        self._rows[row * SLOTS + slot] = 0
        _unlock(self.fd, row)
        return False


class PeerEpochs:
    """The page of a peer. Its numbers are only read here; a row is taken when there is something to write.

    Attributes:
        slots: its numbers.
        identity: which object it is.
    """

    def __init__(self, page: Descriptor) -> None:
        """
        Raises:
            ValueError: it is no such page.
            OSError: it cannot be mapped.
        """
        facts = os.fstat(page.fd)
        if facts.st_size != _PAGE_BYTES:
            raise ValueError(f"epochs_fd: a page of epochs has {_PAGE_BYTES} bytes, and this one {facts.st_size}")
        self.identity = (facts.st_dev, facts.st_ino)
        self.slots = Mapping(page.fd, 0, _ROWS_AT, writable=False).view().cast("Q")
        self._page = page
        self._row: memoryview | None = None
        self._row_held: Descriptor | None = None
        self._lock = threading.Lock()
        self._writers: dict[int, int] = {}
        _forked.add(self)

    def enter(self, slot: int) -> None:
        """Says that this process writes to a region, until :meth:`leave`. Whether it may is to be looked at after this.

        Raises:
            OSError: there is no room for one more that writes, or the page cannot be opened for it.
        """
        with self._lock:
            row = self._row
            if row is None:
                row = self._row = self._take_row()
            writers = self._writers.get(slot, 0)
            self._writers[slot] = writers + 1
            if not writers:
                row[slot] = 1
        # The byte must be seen by others before this looks at the slot. The end of the lock sees to it on x86.
        if not STRONGLY_ORDERED:
            fence()

    def leave(self, slot: int) -> None:
        if not STRONGLY_ORDERED:
            fence()
        with self._lock:
            writers = self._writers.pop(slot) - 1
            if writers:
                self._writers[slot] = writers
            elif self._row is not None:
                self._row[slot] = 0

    def _take_row(self) -> memoryview:
        # Opened anew, since a descriptor that came from elsewhere has its locks in common with others.
        own = reopened(self._page.fd, writable=True)
        for row in range(ROWS):
            if _lock(own.fd, row):
                view = Mapping(own.fd, _ROWS_AT + row * SLOTS, SLOTS, writable=True).view()
                view[:] = bytes(SLOTS)
                self._row_held = own
                return view
        raise OSError(f"{ROWS} connections write to that process already")

    def after_fork(self) -> None:
        """The child has a row of its own when it writes, and none of its parent's threads."""
        self._lock = threading.Lock()
        self._writers = {}
        self._row = self._row_held = None


_forked: weakref.WeakSet[PeerEpochs] = weakref.WeakSet()


def _in_child() -> None:
    for epochs in list(_forked):
        epochs.after_fork()


os.register_at_fork(after_in_child=_in_child)


def _lock(fd: int, row: int) -> bool:
    """Takes a row; False when another one has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, row))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(fd: int, row: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, row))


def _flock(kind: int, row: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, _ROWS_AT + row * SLOTS, 1, 0)
