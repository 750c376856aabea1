"""What memory may be registered, and what names and handles stand for."""

from __future__ import annotations

import ctypes
import mmap
from types import SimpleNamespace
from typing import Any

import pytest

from computemesh.peer.errors import NO_REGION, PeerError
from computemesh.peer.regions import LocalRegions, check_name, memory_of, next_epoch


def bytes_at(address: int, length: int) -> bytes:
    return ctypes.string_at(address, length)


def test_a_buffer_is_found_at_its_address_and_from_its_offset_on() -> None:
    data = bytearray(b"0123456789")
    memory = memory_of(data, 2, 5)
    assert (memory.length, memory.writable) == (5, True)
    assert bytes_at(memory.address, 5) == b"23456"
    assert memory.view is not None
    memory.view[:2] = b"ab"
    assert data == b"01ab456789"


@pytest.mark.parametrize(
    "thing", [b"0123456789", memoryview(b"0123456789"), memoryview(bytearray(b"0123456789")).toreadonly()]
)
def test_what_can_only_be_read_is_registered_so(thing: Any) -> None:
    memory = memory_of(thing, 1)
    assert not memory.writable
    assert bytes_at(memory.address, memory.length) == b"123456789"


def test_a_mapping_and_an_array_of_numbers_count_in_bytes() -> None:
    with mmap.mmap(-1, 4096) as mapping:
        memory = memory_of(mapping)
        assert memory.length == 4096
        del memory
    numbers = memoryview(bytearray(64)).cast("d")
    assert memory_of(numbers).length == 64


def test_an_address_means_the_bytes_behind_it() -> None:
    data = (ctypes.c_ubyte * 8)(*range(8))
    memory = memory_of(ctypes.addressof(data), 2, 3)
    assert memory.view is not None
    assert bytes(memory.view) == b"\2\3\4"


def tensor(**facts: Any) -> Any:
    data = (ctypes.c_ubyte * 16)(*range(16))
    there = {
        "data_ptr": lambda: ctypes.addressof(data),
        "is_contiguous": lambda: True,
        "numel": lambda: 4,
        "element_size": lambda: 4,
        "device": SimpleNamespace(type="cpu"),
        "data": data,
    }
    return SimpleNamespace(**{**there, **facts})


def test_a_tensor_is_taken_as_it_is() -> None:
    memory = memory_of(tensor(), 4)
    assert memory.length == 12
    assert memory.view is not None
    assert bytes(memory.view[:2]) == b"\4\5"


def test_a_tensor_of_a_gpu_has_no_bytes_that_the_processor_could_read() -> None:
    assert memory_of(tensor(device=SimpleNamespace(type="cuda"))).view is None


@pytest.mark.parametrize(
    ("ptr", "offset", "length", "error", "says"),
    [
        (object(), 0, None, TypeError, "ptr: an address or an object with the buffer protocol is wanted, not object"),
        (True, 0, 4, TypeError, "not bool"),
        (4096, 0, None, TypeError, "length: it must be given"),
        (0, 0, 4, ValueError, "ptr: 0 is not the address"),
        (2**64, 0, 4, ValueError, "is not the address"),
        (4096, 0, 0, ValueError, "length: it is 0"),
        (bytearray(4), 0, 5, ValueError, "length: 5 bytes from 0 on leave the object, which has 4"),
        (bytearray(4), 5, None, ValueError, "leave the object"),
        (bytearray(4), 4, None, ValueError, "length: it is 0"),
        (bytearray(4), -1, None, ValueError, "offset: -1 is negative"),
        (bytearray(4), 1.5, None, TypeError, "offset: a whole number is wanted"),
        (memoryview(bytearray(8))[::2], 0, None, ValueError, "do not lie in one piece"),
        (tensor(is_contiguous=lambda: False), 0, None, ValueError, "do not lie in one piece"),
        (tensor(), 0, 17, ValueError, "leave the object"),
        ((ctypes.py_object * 2)(), 0, None, ValueError, "ptr: it holds Python objects"),
    ],
)
def test_what_is_no_memory_is_refused_by_the_name_of_the_argument(
    ptr: Any, offset: Any, length: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        memory_of(ptr, offset, length)
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # Nothing of how it was found out.


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\0b", 3, None])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^name: "):
        check_name(name)


def test_epochs_only_rise_and_begin_above_those_of_an_earlier_process() -> None:
    first, second = next_epoch(), next_epoch()
    assert 10**15 < first < second < 2**53  # Microseconds since 1970, which JSON's numbers can tell exactly.


def test_a_name_that_is_registered_again_has_a_new_handle_and_a_higher_epoch_and_the_old_handle_is_none() -> None:
    regions = LocalRegions()
    first = regions.make("kv", memory_of(bytearray(4)))
    assert regions.put(first) is None
    second = regions.make("kv", memory_of(bytearray(4)))
    assert regions.put(second) is first
    assert second.epoch > first.epoch
    assert regions.get("kv") is regions.get(second.handle) is second
    with pytest.raises(PeerError, match=r"handle [0-9]+ is not registered here") as caught:
        regions.get(first.handle)
    assert caught.value.code == NO_REGION


def test_a_region_that_was_taken_is_found_by_neither_name_nor_handle_and_its_handle_is_not_used_again() -> None:
    regions = LocalRegions()
    region = regions.make("kv", memory_of(bytearray(4)))
    regions.put(region)
    assert regions.take("kv") is region
    assert regions.take("kv") is None
    for key in ("kv", region.handle):
        with pytest.raises(PeerError):
            regions.get(key)
    assert regions.new_handle() > region.handle


def test_memory_that_can_only_be_read_is_never_offered_for_writing() -> None:
    assert not LocalRegions().make("kv", memory_of(b"abc"), writable=True).writable
    assert not LocalRegions().make("kv", memory_of(bytearray(3)), writable=False).writable
