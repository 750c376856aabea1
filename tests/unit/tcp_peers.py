"""Two ends of the tcp transport for tests: in one process, or with the other end in a process of its own.

Run as a program it is that other end: it takes the link that is offered on standard input, and does what is told there.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from computemesh.peer.tcp import TcpEndpoint, TcpLink
from computemesh.peer.transport import DONE, Copy, LocalRegion, Outcome, Parties, RemoteRegion

KEY = bytes(range(32))
PATIENCE_S = 60.0
MIB = 1024 * 1024


class Settled:
    """A `done` that may be waited for, and is called once."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self._event = threading.Event()

    def __call__(self, outcome: Outcome) -> None:
        assert self.outcome is None, f"settled twice: {self.outcome}, {outcome}"
        self.outcome = outcome
        self._event.set()

    def wait(self, timeout_s: float = PATIENCE_S) -> Outcome:
        assert self._event.wait(timeout_s), "nothing came of it"
        assert self.outcome is not None
        return self.outcome


def parties(
    me: str = "a",
    peer: str = "b",
    *,
    link: str = "l-1",
    key: bytes = KEY,
    same_host: bool = True,
    timeout_s: float = 10,
    options: Mapping[str, Any] | None = None,
) -> Parties:
    return Parties(
        link=link,
        key=key,
        me=me,
        peer=peer,
        deadline=time.monotonic() + timeout_s,
        options=options or {},
        same_host=same_host,
    )


def connect(a: TcpEndpoint, b: TcpEndpoint, *, link: str = "l-1", same_host: bool = True) -> tuple[TcpLink, TcpLink]:
    """A link, as both ends have it; `a` asks for it."""
    mine = parties(link=link, same_host=same_host)
    theirs, answer = b.accept(parties("b", "a", link=link, same_host=same_host), a.offer(mine))
    ours = a.establish(mine, answer)
    ours.ready(PATIENCE_S)
    theirs.ready(PATIENCE_S)
    return ours, theirs


def region(buffer: bytearray | memoryview, *, handle: int = 1, epoch: int = 1, writable: bool = True) -> LocalRegion:
    view = memoryview(buffer)
    return LocalRegion(
        name=f"r{handle}", handle=handle, epoch=epoch, address=0, length=len(view), writable=writable, view=view
    )


def exposed(endpoint: TcpEndpoint, mine: LocalRegion) -> RemoteRegion:
    """The region as peers see it."""
    token = endpoint.expose(mine)
    assert token is not None
    return seen(mine, token)


def seen(theirs: LocalRegion, token: Mapping[str, Any]) -> RemoteRegion:
    return RemoteRegion(
        name=theirs.name, epoch=theirs.epoch, length=theirs.length, writable=theirs.writable, token=token
    )


def move(link: TcpLink, kind: Literal["read", "write"], *copies: Copy, imm: int | None = None) -> Outcome:
    """Orders, and waits as a future does."""
    settled = Settled()
    drive = link.order(kind, copies, settled, imm=imm)
    if drive is not None:
        drive(None)
    return settled.wait()


class Pair:
    """Two endpoints of one process, with a link, and a region of either."""

    def __init__(self, a: TcpEndpoint, b: TcpEndpoint, length: int = 4 * MIB) -> None:
        self.a, self.b = a, b
        self.link, self.back = connect(a, b)
        self.mine = region(bytearray(length), handle=1)
        self.theirs = region(bytearray(secrets.token_bytes(length)), handle=2)
        self.remote = exposed(b, self.theirs)

    def close(self) -> None:
        self.a.close()
        self.b.close()


def bytes_of(region: LocalRegion) -> bytes:
    assert region.view is not None
    return bytes(region.view)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def loss_of(link: TcpLink) -> Settled:
    """Its reason is that for which the link is lost."""
    lost = Settled()

    def tell(reason: str) -> None:
        lost(Outcome(reason=reason))

    link.on_lost = tell
    return lost


@contextmanager
def held(link: TcpLink) -> Generator[None]:
    """Nothing is answered by this link meanwhile, as if its thread had no time."""
    with ExitStack() as locked:
        for lane in link._answerers:
            locked.enter_context(lane._lock)
        yield


@contextmanager
def not_reading(link: TcpLink) -> Generator[None]:
    """This link reads no answers meanwhile, and sends nothing more than the sockets took at once."""
    with ExitStack() as locked:
        for lane in link._askers:
            locked.enter_context(lane._receiving)
            locked.enter_context(lane._sending)
        yield


class OtherProcess:
    """A process with the other end of a link, and a region of so many bytes, each of them 7."""

    def __init__(self, mine: TcpEndpoint, length: int, *, link: str = "l-1") -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(length), link], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        me = parties(link=link, timeout_s=PATIENCE_S)
        said = self.tell(dict(mine.offer(me)))
        self.link = mine.establish(me, said["answer"])
        self.link.ready(PATIENCE_S)
        self.region = RemoteRegion(name="r1", epoch=1, length=length, writable=True, token=said["token"])

    def tell(self, what: dict[str, Any]) -> dict[str, Any]:
        """Says something, and returns what the process says then."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the other process has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def main(length: int, link: str) -> None:
    def say(what: object) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    endpoint = TcpEndpoint()
    mine = region(bytearray(b"\7") * length)
    token = endpoint.expose(mine)
    theirs, answer = endpoint.accept(parties("b", "a", link=link, timeout_s=PATIENCE_S), json.loads(input()))
    say({"answer": answer, "token": token})
    for line in sys.stdin:
        told = json.loads(line)
        # Reads or writes all of a region of the peer, again and again.
        peer = RemoteRegion(name="r1", epoch=1, length=told["length"], writable=True, token=told["token"])
        copy = Copy(mine, 0, peer, 0, min(length, peer.length))
        settled = Settled()
        theirs.order(told["order"], [copy] * told["times"], settled)
        say({"begun": True})
        if told.get("wait"):
            say({"done": settled.wait() == DONE})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
