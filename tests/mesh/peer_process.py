"""A process of its own that shares memory, and does what a test tells it over a socket, descriptors and all.

`python -m tests.mesh.peer_process FD` is the process; :class:`PeerProcess` is how a test speaks to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from computemesh.peer.epochs import PeerEpochs
from computemesh.peer.memory import Descriptor, SharedMemory, reopened
from computemesh.peer.shm import ShmEndpoint, ShmLink
from computemesh.peer.transport import Copy, LocalRegion, Outcome, Parties, RemoteRegion

PARTIES = Parties(link="l-1", key=bytes(32), me="a", peer="b", deadline=0.0, options={}, same_host=True)


class Reader:
    """One end of a link, in this process."""

    def __init__(self) -> None:
        self.endpoint = ShmEndpoint()
        self.link, _ = self.endpoint.accept(PARTIES, {})

    def close(self) -> None:
        self.link.close()
        self.endpoint.close()


def local_region(memory: SharedMemory, name: str = "kv", epoch: int = 1, *, writable: bool = True) -> LocalRegion:
    return LocalRegion(
        name=name,
        handle=1,
        epoch=epoch,
        address=memory.address,
        length=memory.length,
        writable=writable,
        view=memory.view(),
        fd=memory.fd,
        fd_offset=memory.offset,
        held=memory,
    )


def moved(link: ShmLink, kind: Any, *copies: Copy) -> Outcome:
    """Orders it, waits for it as a future does, and says how it ended."""
    ended: list[Outcome] = []
    drive = link.order(kind, copies, ended.append)
    while not ended:
        assert drive is not None
        drive(None)
    assert len(ended) == 1
    return ended[0]


class PeerProcess:
    """The other process."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.mesh.peer_process", str(theirs.fileno())]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=root)
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()

    def ask(self, what: str, fds: list[int] | None = None, **how: Any) -> tuple[dict[str, Any], list[Descriptor]]:
        self.tell(what, fds, **how)
        return self.hear()

    def tell(self, what: str, fds: list[int] | None = None, **how: Any) -> None:
        socket.send_fds(self.socket, [json.dumps({"what": what, **how}).encode()], fds or [])

    def hear(self) -> tuple[dict[str, Any], list[Descriptor]]:
        data, fds, _, _ = socket.recv_fds(self.socket, 1 << 16, 8)
        if not data:
            raise EOFError("the other process has ended")
        return json.loads(data), [Descriptor(fd) for fd in fds]

    def put(self, name: str = "kv", **how: Any) -> RemoteRegion:
        """A region of the other process, as this one finds it."""
        region, (fd, page) = self.ask("put", name=name, **how)
        token = {**region["token"], "fd": fd, "epochs_fd": page}
        return RemoteRegion(name, region["epoch"], region["length"], region["writable"], token)

    def digest(self, name: str = "kv") -> str:
        return str(self.ask("digest", name=name)[0]["digest"])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data).hexdigest()


@functools.lru_cache(maxsize=32)
def pattern(length: int, seed: int) -> bytes:
    """Bytes that are nowhere the same, as far as 16 of them tell."""
    block = hashlib.shake_128(seed.to_bytes(8, "big")).digest(1 << 16)
    parts = [(number.to_bytes(8, "big") + block)[:65521] for number in range(-(-length // 65521))]
    return b"".join(parts)[:length]


# --- the process itself -----------------------------------------------------------------------------------------


class _Process:
    def __init__(self) -> None:
        self.endpoint = ShmEndpoint()
        self.regions: dict[str, LocalRegion] = {}
        self.epoch = 0
        self.link: ShmLink | None = None
        self.peer_epochs: PeerEpochs | None = None
        self.kept: list[RemoteRegion] = []

    def put(
        self, fds: list[int], name: str, length: int, seed: int = 0, writable: bool = True, epoch: int | None = None
    ) -> tuple[dict[str, Any], list[Descriptor]]:
        self.epoch = self.epoch + 1 if epoch is None else epoch
        old = self.regions.get(name)
        memory = old.held if old is not None else SharedMemory.allocate(length, peers_write=writable)
        assert isinstance(memory, SharedMemory)
        region = local_region(memory, name, self.epoch, writable=writable)
        if old is not None:
            self.endpoint.conceal(old)
        assert region.view is not None
        region.view[:] = pattern(length, seed)
        token = self.endpoint.expose(region)
        self.regions[name] = region
        facts = {"token": token, "epoch": region.epoch, "length": length, "writable": writable}
        return facts, [reopened(memory.fd, writable=writable), reopened(self.endpoint.epochs_fd)]

    def end(self, fds: list[int], name: str) -> tuple[dict[str, Any], list[Descriptor]]:
        self.endpoint.conceal(self.regions.pop(name))
        return {}, []

    def digest(self, fds: list[int], name: str) -> tuple[dict[str, Any], list[Descriptor]]:
        view = self.regions[name].view
        assert view is not None
        return {"digest": digest(view)}, []

    def held(self, fds: list[int]) -> tuple[dict[str, Any], list[Descriptor]]:
        maps = Path("/proc/self/maps").read_text().count("/memfd:computemesh")
        return {"fds": len(os.listdir("/proc/self/fd")), "maps": maps}, []  # noqa: PTH208

    def reach(self, fds: list[int], **region: Any) -> tuple[dict[str, Any], list[Descriptor]]:
        token = {**region.pop("token"), "fd": Descriptor(fds[0]), "epochs_fd": Descriptor(fds[1])}
        self.kept.append(RemoteRegion(token=token, **region))
        if self.link is None:
            self.link, _ = self.endpoint.accept(PARTIES, {})
        return {}, []

    def move(self, fds: list[int], kind: str, name: str, length: int) -> tuple[dict[str, Any], list[Descriptor]]:
        assert self.link is not None
        outcome = moved(self.link, kind, Copy(self.regions[name], 0, self.kept[-1], 0, length))
        return {"code": outcome.code}, []

    def enter(self, fds: list[int], slot: int) -> tuple[dict[str, Any], list[Descriptor]]:
        self.peer_epochs = PeerEpochs(Descriptor(fds[0]))
        self.peer_epochs.enter(slot)
        return {}, []

    def leave(self, fds: list[int], slot: int) -> tuple[dict[str, Any], list[Descriptor]]:
        assert self.peer_epochs is not None
        self.peer_epochs.leave(slot)
        return {}, []


def _main(number: int) -> None:
    sock = socket.socket(fileno=number)
    process = _Process()
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 8)
        if not data:
            return
        how = json.loads(data)
        answer, given = getattr(process, how.pop("what"))(fds, **how)
        socket.send_fds(sock, [json.dumps(answer).encode()], [one.fd for one in given])
        del given


if __name__ == "__main__":
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    _main(int(sys.argv[1]))
