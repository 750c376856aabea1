"""Memory that processes of one machine have in common: how it is made, mapped, and found again by an address.

What is mapped here is always an object that cannot become smaller (a memfd with ``F_SEAL_SHRINK``): a mapping of a file
that somebody cuts is a trap, since the processor kills who touches what is gone (``SIGBUS``). Nothing here needs to be
closed: descriptors and mappings end when nobody holds them any more, and so never under a copy that still runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import stat
import sys
import threading
import weakref
from typing import Final

import psutil

if sys.platform == "linux":
    import fcntl
    import mmap

POPULATE_MAX: Final = 1024**3
"""Bytes. The pages of a mapping up to this size are looked up when it is made (0.13 s for 1 GiB here), which else each
first touch pays, at four times the price; those of a larger one when they are touched."""

_LENGTH_MAX: Final = 2**62
_LEFT_FREE: Final = 128 * 1024**2
"""Bytes that new shared memory leaves to the machine."""
_FILL_STEP: Final = 256 * 1024**2
_F_SEAL_FUTURE_WRITE: Final = 0x10
"""Nobody can write any more, except through the mappings that there were before. Linux 5.1."""
_MADV_POPULATE_READ: Final = 22
"""Linux 5.14. For shared memory it makes writing as fast as its twin ``_WRITE`` does, at a third of the cost."""
_MADV_COLLAPSE: Final = 25
"""Linux 6.1. It asks for huge pages now, also where shmem_enabled is `never`; only `deny` forbids it."""
_HUGE_PAGE: Final = 2 * 1024**2
_PROT_NONE: Final = 0
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


class Descriptor:
    """A file descriptor that is closed when nobody holds this any more.

    Attributes:
        fd: its number; -1 once it was closed.
    """

    __slots__ = ("__weakref__", "_end", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._end = weakref.finalize(self, _close, fd)
        self._end.atexit = False

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        """Closes it now. May be called again."""
        self.fd = -1
        self._end()


class Mapping:
    """A piece of a memory object, at an address of this process. It is unmapped when nobody holds it any more.

    Attributes:
        address: of its first byte.
        length: bytes.
        writable: by this process.
    """

    __slots__ = ("__weakref__", "address", "length", "writable")

    def __init__(self, fd: int, offset: int, length: int, *, writable: bool) -> None:
        """
        Args:
            fd: of a memfd that is sealed against shrinking; it can be closed afterwards.
            offset: where the piece begins; any byte.

        Raises:
            ValueError: the object can shrink, or the piece leaves it.
            OSError: it cannot be mapped, as when its descriptor can only be read and `writable` is wanted.
        """
        if not is_sealed(fd):
            raise ValueError("fd: the object can shrink, so it cannot be mapped safely; seal it (F_SEAL_SHRINK)")
        facts = os.fstat(fd)
        if not (offset >= 0 and 0 < length <= facts.st_size - offset):
            raise ValueError(f"length: {length} bytes from {offset} on leave the object, which has {facts.st_size}")
        # Huge pages (MFD_HUGETLB) can only be mapped from the beginning of one; their size is the object's block size.
        page = max(mmap.PAGESIZE, facts.st_blksize)
        lead = offset % page
        span = -(-(lead + length) // page) * page
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        base = _map(fd, offset - lead, span, prot, max(page, _HUGE_PAGE))
        weakref.finalize(self, _libc.munmap, base, span).atexit = False
        self.address: int = base + lead
        self.length = length
        self.writable = writable
        if span >= _HUGE_PAGE:  # Does nothing where /sys/kernel/mm/transparent_hugepage/shmem_enabled is `never`.
            _libc.madvise(base, span, mmap.MADV_HUGEPAGE)
        if span <= POPULATE_MAX and facts.st_blocks * 512 >= facts.st_size:  # Pages that are not there are not made.
            _libc.madvise(base, span, _MADV_POPULATE_READ)

    def view(self) -> memoryview:
        """Its bytes, format ``B``. They hold the mapping, and so do all objects made from them."""
        array = (ctypes.c_ubyte * self.length).from_address(self.address)
        vars(array)["held"] = self
        view = memoryview(array).cast("B")
        return view if self.writable else view.toreadonly()


class SharedMemory(Mapping):
    """Memory of this process that others can map. It is given back when nobody holds it, here or elsewhere.

    A child made by ``fork`` has the same memory, not a copy of it.

    Attributes:
        fd: of its object. Closed with it.
        offset: where it begins in the object.
    """

    __slots__ = ("_descriptor", "fd", "offset")

    def __init__(self, descriptor: Descriptor, offset: int, length: int, *, writable: bool) -> None:
        super().__init__(descriptor.fd, offset, length, writable=writable)
        self._descriptor = descriptor
        self.fd = descriptor.fd
        self.offset = offset
        _known[id(self)] = self

    @classmethod
    def allocate(cls, length: int, *, peers_write: bool = True) -> SharedMemory:
        """New memory, all zeros, with all its pages, so that none can be missing later.

        Args:
            length: bytes.
            peers_write: if not, the kernel lets no other process write to it, whatever descriptor it has.

        Raises:
            ValueError: `length` is none.
            MemoryError: there is not so much.
            OSError: this system has no such memory.
        """
        if not 0 < length <= _LENGTH_MAX:
            raise ValueError(f"length: {length} is not a number of bytes from 1 to {_LENGTH_MAX}")
        if reason := absent():
            raise OSError(errno.ENOSYS, reason)
        descriptor = Descriptor(os.memfd_create("computemesh", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        _fill(descriptor.fd, length)
        fcntl.fcntl(descriptor.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        memory = cls(descriptor, 0, length, writable=True)
        if not peers_write:
            # An older kernel does not know it. Peers then have a descriptor that can only be read, as always.
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        return memory

    @classmethod
    def attach(cls, fd: int, offset: int = 0, length: int | None = None, *, writable: bool = True) -> SharedMemory:
        """Memory that another one made: a memfd which is sealed against shrinking. `fd` stays the caller's.

        Args:
            length: bytes; left out, to the end of the object.

        Raises:
            ValueError: the object can shrink, or has no such range.
            OSError: it cannot be mapped.
        """
        if reason := absent():
            raise OSError(errno.ENOSYS, reason)
        if length is None:
            length = os.fstat(fd).st_size - offset
        return cls(Descriptor(os.dup(fd)), offset, length, writable=writable)


def _fill(fd: int, length: int) -> None:
    """Gives an empty object all its pages.

    Linux promises more memory than it has, and kills processes when it must keep that. So it is asked first, and for
    a little at a time."""
    lacking = MemoryError(f"length: there are no {length} bytes of memory to share")
    try:
        for begin in range(0, length, _FILL_STEP):
            if length - begin > psutil.virtual_memory().available - _LEFT_FREE:
                raise lacking
            if not begin:
                os.ftruncate(fd, length)
            step = min(_FILL_STEP, length - begin)
            _fill_huge(fd, begin, step - step % _HUGE_PAGE)
            os.posix_fallocate(fd, begin, step)  # What there was no huge page for.
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG, errno.EINVAL):
            raise lacking from None
        raise


def _fill_huge(fd: int, begin: int, length: int) -> None:
    """Gives a part of an object huge pages, as far as the system has some: copies to and from them are up to a third
    faster, and mapping them costs next to nothing. Both numbers are multiples of a huge page's size."""
    if not length:
        return
    for at in range(begin, begin + length, _HUGE_PAGE):  # A huge page is not made of nothing.
        os.posix_fallocate(fd, at, 1)
    base = _map(fd, begin, length, mmap.PROT_READ | mmap.PROT_WRITE, _HUGE_PAGE)
    _libc.madvise(base, length, _MADV_COLLAPSE)
    _libc.munmap(base, length)


def _map(fd: int, offset: int, length: int, prot: int, unit: int) -> int:
    """Maps a part of an object where huge pages of `unit` bytes stay whole. Its address.

    Raises:
        OSError: it cannot be mapped.
    """
    if length < unit:
        base: int = _libc.mmap(None, length, prot, mmap.MAP_SHARED, fd, offset)
        if base == _MAP_FAILED:
            raise _os_error()
        return base
    # The kernel aligns only what it takes for huge itself. So room is kept that has such a place within.
    room = _libc.mmap(None, length + unit, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if room == _MAP_FAILED:
        raise _os_error()
    at: int = room + (offset - room) % unit
    if _libc.mmap(at, length, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) == _MAP_FAILED:
        error = _os_error()
        _libc.munmap(room, length + unit)
        raise error
    if at > room:
        _libc.munmap(room, at - room)
    if at < room + unit:
        _libc.munmap(at + length, room + unit - at)
    return at


_known: weakref.WeakValueDictionary[int, SharedMemory] = weakref.WeakValueDictionary()


def shared_at(address: int, length: int) -> tuple[SharedMemory, int] | None:
    """Which of this process's shared memory these bytes lie in, all of them, and at which offset; None if in none."""
    for memory in list(_known.values()):
        if memory.address <= address and address + length <= memory.address + memory.length:
            return memory, address - memory.address
    return None


def absent() -> str:
    """Why this system has no memory to share; empty when it has."""
    if sys.platform != "linux":
        return "shared memory between peers needs Linux (memfd_create)"
    return ""


def is_sealed(fd: int) -> bool:
    """Whether the object can never become smaller, so that it may be mapped."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False  # No memfd.


def seal(fd: int) -> bool:
    """Seals a memfd against shrinking, if that is allowed. Returns whether it is sealed now."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return is_sealed(fd)


def is_file(fd: int) -> bool:
    """Whether it has bytes at offsets: an ordinary file or memory, and no pipe, device or socket."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def reopened(fd: int, *, writable: bool = False) -> Descriptor:
    """The same object, opened anew: with locks and an access of its own.

    Raises:
        OSError: it may not be opened so.
    """
    return Descriptor(os.open(f"/proc/self/fd/{fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC))


STRONGLY_ORDERED: Final = platform.machine() in ("x86_64", "AMD64", "i686")
"""This processor lets nobody see what a thread did to memory in another order, save a write that comes after a read."""


def fence() -> None:
    """What this thread did to memory before it comes before what it does after it, as others see it.

    A lock keeps what is inside from getting out, on any processor; so nothing gets past two of them."""
    for _ in range(2):
        lock = threading.Lock()
        with lock:
            pass


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.restype = ctypes.c_int
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
