"""Memory that a process offers to its peers: what may be registered, and what is."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any, Final

import msgspec

from computemesh.contracts.peers import RegionName
from computemesh.peer.errors import NO_REGION, PeerError
from computemesh.peer.transport import LocalRegion

_MEMORY_END: Final = 2**63

# From this on the epochs of this process rise. A process that begins later begins above those of an earlier one, so
# that what it registers under the alias and the names of that one is never taken for the same.
_first_epoch: Final = time.time_ns() // 1000
_epoch_lock: Final = threading.Lock()
_last_epoch = _first_epoch


def next_epoch() -> int:
    """A number above all that this process, and an earlier one on this machine, had before."""
    global _last_epoch
    with _epoch_lock:
        _last_epoch += 1
        return _last_epoch


@dataclass(frozen=True, slots=True)
class Memory:
    """A piece of this process's memory."""

    address: int
    length: int
    writable: bool
    view: memoryview | None
    """Its bytes; None where the processor cannot read them, as those of a GPU."""
    held: object
    """What keeps it alive; None behind a bare pointer."""


def memory_of(ptr: Any, offset: int = 0, length: int | None = None, *, field: str = "ptr") -> Memory:
    """What a program means by `ptr`, `offset` and `length`.

    Args:
        ptr: an object with the buffer protocol (bytearray, memoryview, mmap, a numpy array …), a torch tensor, or the
            address of the first byte. The caller keeps what is behind an address alive.
        offset: bytes from the beginning of the object, or from the address.
        length: bytes; left out, to the end of the object.

    Raises:
        TypeError: it is none of these, or an address comes without a length.
        ValueError: its bytes do not lie in one piece, or the range is empty or leaves the object.
    """
    offset = whole_number(offset, "offset")
    wanted = None if length is None else whole_number(length, "length")
    if hasattr(ptr, "data_ptr") and hasattr(ptr, "is_contiguous"):
        return _tensor(ptr, offset, wanted, field)
    if isinstance(ptr, bool):
        raise TypeError(f"{field}: an address or an object with the buffer protocol is wanted, not bool")
    if not is_address(ptr):
        return _buffer(ptr, offset, wanted, field)
    address = index(ptr)
    if wanted is None:
        raise TypeError("length: it must be given with an address")
    if not 0 < address <= _MEMORY_END - offset - wanted:
        raise ValueError(f"{field}: {address} is not the address of {offset + wanted} bytes")
    if wanted == 0:
        raise ValueError("length: it is 0")
    return Memory(address + offset, wanted, writable=True, view=_view_at(address + offset, wanted, None), held=None)


def is_address(ptr: Any) -> bool:
    """Whether it is a number, as one of numpy. An array of numpy is none, though one of a single number could be."""
    if not hasattr(ptr, "__index__") or isinstance(ptr, bool) or hasattr(ptr, "data_ptr"):
        return False
    if isinstance(ptr, Integral):
        return True
    try:
        memoryview(ptr)
    except TypeError:
        return True
    except ValueError:
        pass
    return False


def _buffer(thing: Any, offset: int, length: int | None, field: str) -> Memory:
    try:
        whole = memoryview(thing)
    except TypeError:
        raise TypeError(
            f"{field}: an address or an object with the buffer protocol is wanted, not {type(thing).__name__}"
        ) from None
    except ValueError as error:  # As that of numpy, whose dates are no bytes to it.
        raise ValueError(f"{field}: {error}") from None
    kinds = re.sub(":[^:]*:", "", whole.format)
    if "O" in kinds:
        raise ValueError(f"{field}: it holds Python objects, of which other processes can make nothing")
    if any(kind in kinds for kind in "P&z"):  # A pointer of ctypes: its own eight bytes are not what is meant.
        raise ValueError(f"{field}: it holds an address; give the number, and the length of what is there")
    if not whole.contiguous:
        raise ValueError(f"{field}: its bytes do not lie in one piece; register a contiguous copy")
    length = _range(whole.nbytes, offset, length)
    try:
        view = whole.cast("B")
    except (TypeError, ValueError, NotImplementedError):  # Columns first, or numbers that it does not know.
        view = _view_at(address_of(whole), whole.nbytes, whole)
        view = view.toreadonly() if whole.readonly else view
    view = view[offset : offset + length]
    return Memory(address_of(view), length, writable=not view.readonly, view=view, held=whole)


def _tensor(tensor: Any, offset: int, length: int | None, field: str) -> Memory:
    if not tensor.is_contiguous():
        raise ValueError(f"{field}: the tensor's bytes do not lie in one piece; register a contiguous copy")
    length = _range(int(tensor.numel()) * int(tensor.element_size()), offset, length)
    address = int(tensor.data_ptr()) + offset
    if address == offset:
        raise ValueError(f"{field}: the tensor has no memory (its device is {tensor.device.type!r})")
    view = _view_at(address, length, tensor) if tensor.device.type == "cpu" else None
    return Memory(address, length, writable=True, view=view, held=tensor)


def _range(size: int, offset: int, length: int | None) -> int:
    length = size - offset if length is None else length
    if offset > size or length > size - offset:
        raise ValueError(f"length: {max(length, 0)} bytes from {offset} on leave the object, which has {size}")
    if length <= 0:
        raise ValueError("length: it is 0")
    return length


def whole_number(value: Any, field: str) -> int:
    """*value*, which must be 0 or more.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool):
        raise TypeError(f"{field}: a whole number is wanted, not bool")
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{field}: a whole number is wanted, not {type(value).__name__}") from None
    if number < 0:
        raise ValueError(f"{field}: {number} is negative")
    return number


def _view_at(address: int, length: int, held: object) -> memoryview:
    """The bytes there. The view, and all that are made from it, keep `held` alive."""
    array = (ctypes.c_ubyte * length).from_address(address)
    vars(array)["held"] = held
    return memoryview(array).cast("B")


class _PyBuffer(ctypes.Structure):
    """``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_ANY_CONTIGUOUS: Final = 0x98
"""``PyBUF_ANY_CONTIGUOUS``."""


def address_of(view: memoryview) -> int:
    """Where its bytes are, which lie in one piece; they stay there as long as the view is not released."""
    got = _PyBuffer()  # ctypes' own way refuses what may only be read.
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(got), _ANY_CONTIGUOUS)
    address = int(got.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(got))
    return address


def check_name(name: object) -> str:
    """A name of a region.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: text is wanted, not {type(name).__name__}")
    try:
        return msgspec.convert(name, RegionName)
    except msgspec.ValidationError:
        raise ValueError(
            f"name: {name[:40]!r} is none: 1 to 200 characters, none of them a control character"
        ) from None


class LocalRegions:
    """The regions of one peer, by name and by handle. Handles and epochs are never used twice.

    Lookups need no lock; changes are made under the owner's.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, LocalRegion] = {}
        self.by_handle: dict[int, LocalRegion] = {}
        self._last_handle = 0

    def __iter__(self) -> Iterator[LocalRegion]:
        return iter(list(self.by_name.values()))

    def new_handle(self) -> int:
        """A handle for a region, here or of a peer."""
        self._last_handle += 1
        return self._last_handle

    def make(
        self, name: str, memory: Memory, *, writable: bool = True, fd: int = -1, fd_offset: int = 0
    ) -> LocalRegion:
        """A region with a handle and an epoch of its own, which nobody can find yet."""
        return LocalRegion(
            name=name,
            handle=self.new_handle(),
            epoch=next_epoch(),
            address=memory.address,
            length=memory.length,
            writable=writable and memory.writable,
            view=memory.view,
            fd=fd,
            fd_offset=fd_offset,
            held=memory.held,
        )

    def put(self, region: LocalRegion) -> LocalRegion | None:
        """Lets it be found; returns the one that had the name, which can no longer."""
        old = self.by_name.get(region.name)
        if old is not None:
            self.by_handle.pop(old.handle, None)
        self.by_name[region.name] = region
        self.by_handle[region.handle] = region
        return old

    def take(self, name: str) -> LocalRegion | None:
        """Lets it be found no longer; None if there is none."""
        region = self.by_name.pop(name, None)
        if region is not None:
            self.by_handle.pop(region.handle, None)
        return region

    def get(self, key: str | int) -> LocalRegion:
        """By name or handle.

        Raises:
            PeerError: `no_region`.
        """
        region = self.by_name.get(key) if isinstance(key, str) else self.by_handle.get(key)
        if region is None:
            what = f"memory region {key!r}" if isinstance(key, str) else f"handle {key}"
            raise PeerError(NO_REGION, f"{what} is not registered here; call register_memory_region first")
        return region

    def names(self) -> list[str]:
        return sorted(self.by_name)
