"""Memory as programs have it: each kind is registered, sent, and moved by a transfer to the byte."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from computemesh.peer.agent import PeerAgent
from computemesh.peer.errors import NO_WAY, PeerError
from computemesh.peer.regions import memory_of
from computemesh.testing.peers import Exchange

WAIT_S = 20.0
SIZE = 96
BYTES = bytes(range(SIZE))

Pair = tuple[PeerAgent, PeerAgent]


@pytest.fixture
def pair() -> Generator[Pair]:
    exchange = Exchange()
    a, b = (PeerAgent(alias=alias, attach=exchange.attach(alias)) for alias in "ab")
    a.connect_to("b").wait(WAIT_S)
    there = b.query_connection("a")
    assert there is not None
    there.wait(WAIT_S)
    yield a, b
    a.shutdown()
    b.shutdown()


def _numpy(make: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: make(pytest.importorskip("numpy"))


def _torch(make: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: make(pytest.importorskip("torch"))


def _matrix(np: Any, order: str) -> Any:
    return np.zeros((4, 6), dtype="f4", order=order)


BUFFERS: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: bytearray(SIZE),
    "mmap": lambda: mmap.mmap(-1, SIZE),
    "numbers": lambda: memoryview(bytearray(SIZE)).cast("d"),
    "a matrix": lambda: memoryview(bytearray(SIZE)).cast("B").cast("f", shape=[4, 6]),
    "array": lambda: array.array("d", bytes(SIZE)),
    "ctypes": ctypes.c_double * 12,
    "a struct of ctypes": type("Pair", (ctypes.Structure,), {"_fields_": [("x", ctypes.c_double * 12)]}),
    "numpy": _numpy(lambda np: np.zeros(SIZE, dtype="u1")),
    "numpy by rows": _numpy(lambda np: _matrix(np, "C")),
    "numpy by columns": _numpy(lambda np: _matrix(np, "F")),
    "a row of numpy": _numpy(lambda np: np.zeros((3, SIZE), dtype="u1")[1]),
    "numpy, complex": _numpy(lambda np: np.zeros(12, dtype="c8")),
    "numpy, big-endian": _numpy(lambda np: np.zeros(12, dtype=">f8")),
    "numpy, records": _numpy(lambda np: np.zeros(8, dtype=[("key", "<i4"), ("value", "<f8")])),
    "numpy, half": _numpy(lambda np: np.zeros(48, dtype="f2")),
    "numpy, one number": _numpy(lambda np: np.zeros((), dtype="S96")),
    "torch": _torch(lambda torch: torch.zeros((4, 6), dtype=torch.float32)),
    "torch, bfloat16": _torch(lambda torch: torch.zeros(48, dtype=torch.bfloat16)),
}


def _bytes(thing: Any) -> bytes:
    """What is in its memory, in the order in which it lies there."""
    memory = memory_of(thing)
    return ctypes.string_at(memory.address, memory.length)


@pytest.mark.parametrize("kind", BUFFERS)
def test_any_memory_in_one_piece_is_read_into_written_from_and_takes_messages(pair: Pair, kind: str) -> None:
    a, b = pair
    thing = BUFFERS[kind]()
    theirs = b.allocate_memory_region("kv", SIZE).view
    theirs[:] = BYTES
    a.register_memory_region("kv", thing)
    assert a.read("b", ("kv", 0, 0, SIZE)).wait(WAIT_S) == 0
    assert _bytes(thing) == BYTES
    theirs[:] = bytes(SIZE)
    assert a.write("b", ("kv", 0, 0, SIZE)).wait(WAIT_S) == 0
    assert bytes(theirs) == BYTES
    message = a.recv("b", thing)
    b.send("a", BYTES[::-1]).wait(WAIT_S)
    message.wait(WAIT_S)
    assert (message.received, _bytes(thing)) == (SIZE, BYTES[::-1])


@pytest.mark.parametrize("kind", BUFFERS)
def test_memory_stays_where_it_is_as_long_as_it_is_registered_or_looked_at(kind: str) -> None:
    """Also when the program has forgotten it."""
    memory = memory_of(BUFFERS[kind](), 8, 16)
    view = memory.view
    assert view is not None
    view[:] = BYTES[:16]
    del memory
    others = [bytearray(b"\xff" * SIZE) for _ in range(100)]
    assert bytes(view) == BYTES[:16]
    del others


@pytest.mark.parametrize(
    "thing",
    [
        _numpy(lambda np: np.zeros((8, 8), dtype="u1")[:, :4]),
        _numpy(lambda np: np.zeros(64, dtype="u1")[::2]),
        _numpy(lambda np: np.zeros((2, 3, 4), dtype="u1").transpose(1, 0, 2)),
        _torch(lambda torch: torch.zeros((8, 8))[:, :4]),
        lambda: memoryview(bytearray(64))[::-1],
    ],
)
def test_memory_that_does_not_lie_in_one_piece_is_refused(pair: Pair, thing: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="do not lie in one piece; register a contiguous copy"):
        pair[0].register_memory_region("kv", thing())


@pytest.mark.parametrize(
    "thing",
    [
        _numpy(lambda np: np.frombuffer(BYTES, dtype="u1")),
        _numpy(lambda np: np.asfortranarray(np.frombuffer(BYTES, dtype="u1").reshape(8, 12)).view()),
        lambda: BYTES,
        lambda: memoryview(bytearray(BYTES)).toreadonly(),
    ],
)
def test_memory_that_can_only_be_read_is_given_away_and_not_changed(pair: Pair, thing: Callable[[], Any]) -> None:
    a, b = pair
    memory = thing()
    if getattr(memory, "flags", None) is not None:
        memory.flags.writeable = False
    kept = _bytes(memory)
    b.register_memory_region("kv", memory)
    a.register_memory_region("kv", mine := bytearray(SIZE))
    a.read("b", ("kv", 0, 0, SIZE)).wait(WAIT_S)
    assert bytes(mine) == kept
    with pytest.raises(PeerError, match="may only be read"):
        a.write("b", ("kv", 0, 0, SIZE))
    with pytest.raises(PeerError, match="be read"):
        b.read("a", ("kv", 0, 0, SIZE)).wait(WAIT_S)
    assert _bytes(memory) == kept


@pytest.mark.parametrize(
    ("thing", "error", "says"),
    [
        (_numpy(lambda np: np.zeros((0, 4))), ValueError, "length: it is 0"),
        (_numpy(lambda np: np.array(["x"], dtype=object)), ValueError, "ptr: it holds Python objects"),
        (_numpy(lambda np: np.zeros(4, dtype="M8[s]")), ValueError, "^ptr: "),
        (_torch(lambda torch: torch.zeros(4, device="meta")), ValueError, "ptr: the tensor has no memory"),
        (lambda: ctypes.c_void_p(4096), ValueError, "ptr: it holds an address; give the number"),
        (lambda: ctypes.pointer(ctypes.c_int(1)), ValueError, "ptr: it holds an address; give the number"),
        (lambda: ctypes.c_char_p(b"x"), ValueError, "ptr: it holds an address; give the number"),
        (lambda: [1, 2], TypeError, "ptr: an address or an object with the buffer protocol is wanted, not list"),
        (lambda: 4096.0, TypeError, "ptr: an address or an object with the buffer protocol is wanted, not float"),
    ],
)
def test_what_is_no_memory_for_others_is_refused(
    pair: Pair, thing: Callable[[], Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        pair[0].register_memory_region("kv", thing())
    assert pair[0].list_mem_keys() == []


def test_an_array_of_one_number_is_memory_and_a_number_of_the_same_library_is_an_address(pair: Pair) -> None:
    np = pytest.importorskip("numpy")
    one = np.array(7, dtype="i8")
    assert memory_of(one).length == 8
    assert memory_of(one).address == one.ctypes.data
    data = (ctypes.c_ubyte * 8)()
    address = memory_of(np.int64(ctypes.addressof(data)), 0, 8)
    assert (address.address, address.length) == (ctypes.addressof(data), 8)
    with pytest.raises(ValueError, match="leave the object"):
        pair[0].register_memory_region("kv", one, 4, 8)


def test_a_buffer_cannot_change_its_size_while_it_is_registered(pair: Pair) -> None:
    buffer = bytearray(SIZE)
    pair[0].register_memory_region("kv", buffer)
    with pytest.raises(BufferError):
        buffer.append(1)
    pair[0].unregister_memory_region("kv")
    buffer.append(1)


def test_a_file_in_memory_is_read_by_peers_of_the_machine_as_it_is(pair: Pair, tmp_path: Path) -> None:
    a, b = pair
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    path = folder / f"computemesh-test-{os.getpid()}"
    try:
        with path.open("w+b") as file:
            file.write(bytes(4096) + BYTES)
            file.flush()
            mapping = mmap.mmap(file.fileno(), 0)
            b.register_memory_region("kv", mapping, 4096, SIZE, fd=file.fileno())
        here = a.allocate_memory_region("kv", SIZE)
        read = a.read("b", ("kv", 0, 0, SIZE))
        assert (read.wait(WAIT_S), read.transport, bytes(here.view)) == (0, "shm", BYTES)
        here.view[:4] = b"abcd"
        a.write("b", ("kv", 0, 0, 4)).wait(WAIT_S)
        assert mapping[4096:4102] == b"abcd\4\5"
    finally:
        path.unlink(missing_ok=True)


def test_memory_of_a_gpu_that_nothing_reaches_is_refused_when_it_is_registered(pair: Pair) -> None:
    tensor = SimpleNamespace(
        data_ptr=lambda: 4096,
        is_contiguous=lambda: True,
        numel=lambda: 4,
        element_size=lambda: 4,
        device=SimpleNamespace(type="cuda"),
    )
    with pytest.raises(PeerError, match="memory of a GPU is reached by RDMA alone: ") as caught:
        pair[0].register_memory_region("kv", tensor)
    assert caught.value.code == NO_WAY
    assert pair[0].list_mem_keys() == []
