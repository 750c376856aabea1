"""Memory that processes have in common: it cannot shrink, is found by address, and goes when nobody holds it."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import resource
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from computemesh.peer.memory import Descriptor, Mapping, SharedMemory, is_sealed, reopened, seal, shared_at

MIB = 1024**2


def held() -> tuple[int, int]:
    """How many descriptors this process has, and how many mappings of shared memory."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("/memfd:computemesh")  # noqa: PTH208


def unsealed(length: int) -> Descriptor:
    made = Descriptor(os.memfd_create("test", os.MFD_ALLOW_SEALING))
    os.ftruncate(made.fd, length)
    return made


def test_new_memory_is_zero_and_can_be_written() -> None:
    view = SharedMemory.allocate(10_000).view()
    assert bytes(view) == bytes(10_000)
    view[9_990:] = b"0123456789"
    assert bytes(view[9_985:]) == bytes(5) + b"0123456789"


def test_nobody_can_make_memory_smaller_or_take_the_seal_away() -> None:
    """Else who has mapped it would be killed by the processor."""
    made = SharedMemory.allocate(MIB)
    for length in (0, MIB - 1, MIB + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(made.fd, length)
    assert is_sealed(made.fd)


def test_all_pages_of_new_memory_are_there() -> None:
    """Nothing can fail for want of memory later."""
    made = SharedMemory.allocate(3 * MIB + 1)
    assert os.fstat(made.fd).st_blocks * 512 >= 3 * MIB + 1


def test_memory_that_peers_may_not_write_is_written_by_its_owner_alone() -> None:
    made = SharedMemory.allocate(MIB, peers_write=False)
    view = made.view()
    view[:4] = b"mine"
    other = reopened(made.fd, writable=True)
    with pytest.raises(PermissionError):
        os.pwrite(other.fd, b"not", 0)
    with pytest.raises(PermissionError):
        Mapping(other.fd, 0, MIB, writable=True)
    view[4:8] = b"also"
    assert os.pread(other.fd, 8, 0) == b"minealso"


@pytest.mark.parametrize("length", [0, -1, 2**63])
def test_a_length_that_is_none_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        SharedMemory.allocate(length)


def test_more_than_there_is_is_a_memory_error_and_holds_nothing() -> None:
    before = held()
    with pytest.raises(MemoryError, match="length"):
        SharedMemory.allocate(2**60)
    assert held() == before


def test_what_may_shrink_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    file = Descriptor(os.open(path, os.O_RDWR))
    for one in (file, unsealed(4096)):
        with pytest.raises(ValueError, match="F_SEAL_SHRINK"):
            SharedMemory.attach(one.fd)


def test_a_memfd_can_be_sealed_where_its_maker_allowed_it(tmp_path: Path) -> None:
    allowed, forbidden = unsealed(4096), Descriptor(os.memfd_create("test"))
    assert seal(allowed.fd)
    assert is_sealed(allowed.fd)
    assert not seal(forbidden.fd)
    os.ftruncate(allowed.fd, 8192)  # It may grow.
    with pytest.raises(PermissionError):
        os.ftruncate(allowed.fd, 4096)


@pytest.mark.parametrize(("offset", "length"), [(0, 4097), (1, 4096), (4096, 1), (-1, 10), (0, 0), (2**62, 1), (0, -1)])
def test_a_range_that_leaves_the_object_is_not_mapped(offset: int, length: int) -> None:
    made = SharedMemory.allocate(4096)
    with pytest.raises(ValueError, match="length"):
        SharedMemory.attach(made.fd, offset, length)


def test_what_can_only_be_read_is_not_mapped_for_writing() -> None:
    made = SharedMemory.allocate(4096)
    made.view()[:3] = b"abc"
    readable = reopened(made.fd)
    with pytest.raises(PermissionError):
        SharedMemory.attach(readable.fd)
    view = SharedMemory.attach(readable.fd, writable=False).view()
    assert bytes(view[:3]) == b"abc"
    with pytest.raises(TypeError):
        view[0] = 1


def test_mapping_what_has_no_pages_makes_none() -> None:
    """Else who hands over an empty object would have others fill it."""
    made = unsealed(64 * MIB)
    assert seal(made.fd)
    memory = SharedMemory.attach(made.fd)
    assert os.fstat(made.fd).st_blocks == 0
    assert memory.view()[MIB] == 0


def test_the_pages_of_a_mapping_are_looked_up_when_it_is_made() -> None:
    """And not one by one while bytes are moved."""
    made = SharedMemory.allocate(16 * MIB)
    memory = SharedMemory.attach(made.fd)
    view, before = memory.view(), faults()
    total = sum(view[:: mmap.PAGESIZE].tobytes())
    assert (total, faults() - before < 100) == (0, True)


def test_new_memory_lies_in_huge_pages_and_is_mapped_by_them_wherever_it_can_be() -> None:
    """Also in part, and by others; a mapping is where the processor can take a huge page whole."""
    if not system_gives_huge_pages():
        pytest.skip("this system gives shared memory no huge pages")
    made = SharedMemory.allocate(9 * MIB + 1)
    part = SharedMemory.attach(made.fd, 4097, 8 * MIB, writable=False)
    assert huge_mib(made.address) >= 2
    assert huge_mib(part.address) >= 2
    view = made.view()
    view[4 * MIB :] = b"x" * (5 * MIB + 1)
    assert part.view()[4 * MIB - 4098 : 4 * MIB - 4095].tobytes() == b"\0xx"


def test_a_piece_of_mapped_memory_leaves_no_room_behind_that_is_kept_for_it() -> None:
    gc.collect()
    before = mapped_mib()
    made = [SharedMemory.allocate(3 * MIB) for _ in range(50)]
    assert mapped_mib() - before < 50 * 3 + 20
    del made
    gc.collect()
    assert mapped_mib() - before < 20


def system_gives_huge_pages() -> bool:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not enabled.exists() or "[deny]" in enabled.read_text():
        return False
    with mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(4 * MIB)
        try:
            memory.madvise(25)  # MADV_COLLAPSE, which kernels before 6.1 do not know
        except OSError:
            return False
    return True


def huge_mib(address: int) -> int:
    """How much is mapped by huge pages of the mapping that has this address."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(each, 16) for each in first.split("-"))
            found = begin <= address < end
        elif found and first == "ShmemPmdMapped:":
            return int(rest.split()[0]) // 1024
    return 0


def mapped_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE // MIB


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_a_closed_descriptor_is_an_error_and_no_crash() -> None:
    made = SharedMemory.allocate(4096)
    one = reopened(made.fd)
    number = one.fd
    one.close()
    one.close()
    assert one.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@settings(deadline=None)
@given(st.integers(0, 20_000), st.integers(1, 20_000))
def test_a_piece_is_mapped_from_any_byte_on(offset: int, length: int) -> None:
    made = SharedMemory.allocate(40_000)
    whole = made.view()
    whole[:] = bytes(number * 7 % 251 for number in range(40_000))
    piece = SharedMemory.attach(made.fd, offset, length)
    assert bytes(piece.view()) == bytes(whole[offset : offset + length])
    piece.view()[length - 1] = 255
    assert whole[offset + length - 1] == 255


@settings(deadline=None)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=6), st.data())
def test_an_address_is_found_in_the_memory_it_lies_in_and_nowhere_else(lengths: list[int], data: st.DataObject) -> None:
    made = [SharedMemory.allocate(length) for length in lengths]
    one = data.draw(st.sampled_from(made))
    offset = data.draw(st.integers(-2, one.length + 2))
    length = data.draw(st.integers(1, one.length + 4))
    inside = offset >= 0 and offset + length <= one.length
    found = shared_at(one.address + offset, length)
    if inside:
        assert found == (one, offset)
    else:
        assert found is None or found[0] is not one


def test_private_memory_is_found_nowhere() -> None:
    private = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(private))
    assert shared_at(address, 10) is None


def test_memory_lives_as_long_as_anything_made_from_it() -> None:
    before = held()
    made = SharedMemory.allocate(MIB)
    address = made.address
    part = made.view()[10:20].cast("B")
    part[:] = b"0123456789"
    del made
    gc.collect()
    assert bytes(part) == b"0123456789"
    found = shared_at(address + 10, 10)
    assert found is not None
    assert os.pread(found[0].fd, 10, 10) == b"0123456789"
    del found, part
    assert held() == before
    assert shared_at(address + 10, 10) is None


def test_thousands_of_pieces_leave_nothing_behind() -> None:
    before = held()
    kept: list[memoryview] = []
    for number in range(5000):
        kept.append(SharedMemory.allocate(1 + number).view())
        if len(kept) > 50:
            kept.pop(0)
    assert held() == (before[0] + 50, before[1] + 50)
    kept.clear()
    assert held() == before


def test_what_cannot_be_mapped_leaves_no_descriptor_behind() -> None:
    open_file = unsealed(10)
    before = held()
    for _ in range(100):
        with pytest.raises(ValueError, match="F_SEAL_SHRINK"):
            SharedMemory.attach(open_file.fd)
    assert held() == before


def test_a_child_has_the_same_memory_and_its_end_takes_nothing_away() -> None:
    made = SharedMemory.allocate(4096)
    view = made.view()
    view[:6] = b"parent"
    child = os.fork()
    if not child:  # pragma: no cover
        code = 1
        try:
            assert bytes(view[:6]) == b"parent"
            assert shared_at(made.address, 4096) == (made, 0)
            view[:6] = b"child!"
            del made, view
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(view[:6]) == b"child!"
    assert os.pread(made.fd, 6, 0) == b"child!"


def test_a_system_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="Linux") as refused:
        SharedMemory.allocate(1)
    assert refused.value.errno == errno.ENOSYS
