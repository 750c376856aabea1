"""The two ends of a link, each with an interface of its own; one of them in another process."""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final, Literal

from computemesh.peer.rdma import RdmaEndpoint
from computemesh.peer.rdma.link import RdmaLink
from computemesh.peer.rdma.verbs import load
from computemesh.peer.regions import address_of
from computemesh.peer.transport import Copy, LocalRegion, Outcome, Parties, RemoteRegion

WAIT_S: Final = 60.0
KEY: Final = bytes(range(32))

Told = dict[str, Any]
"""A region, as its owner tells of it."""


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


class Side:
    """One end. What it begins has a ticket; `outcome` waits for it."""

    def __init__(self, name: str, peer: str, device: str, library: str) -> None:
        self.name, self.peer, self.device = name, peer, device
        self.endpoint = RdmaEndpoint(device, verbs=load([library]))
        self.link: RdmaLink | None = None
        self.lost: list[str] = []
        self.memory: dict[str, bytearray] = {}
        self.regions: dict[str, LocalRegion] = {}
        self._tickets = itertools.count(1)
        self._outcomes: dict[int, queue.Queue[Outcome]] = {}
        self._into: dict[int, bytearray] = {}

    def facts(self) -> Any:
        return self.endpoint.facts()

    def refused(self) -> int:
        return self.endpoint.refused

    def expose(self, name: str, length: int, seed: int, *, writable: bool = True, epoch: int = 1) -> Told:
        memory = self.memory[name] = bytearray(pattern(seed, length))
        view = memoryview(memory)
        region = LocalRegion(name, 1, epoch, address_of(view), length, writable, view, held=memory)
        token = self.endpoint.expose(region)
        assert token is not None
        self.regions[name] = region
        return {"name": name, "epoch": epoch, "length": length, "writable": writable, "token": token}

    def conceal(self, name: str) -> float:
        """Returns how long it took."""
        region = self.regions[name]
        region.live = False
        began = time.monotonic()
        self.endpoint.conceal(region)
        return time.monotonic() - began

    def parties(self, link: str, key: bytes, pairs: int = 1, **options: Any) -> Parties:
        wanted = {"qp_num": pairs, **options}
        return Parties(link, key, self.name, self.peer, time.monotonic() + WAIT_S, wanted, same_host=True)

    def offer(self, link: str, pairs: int, **options: Any) -> Any:
        return self.endpoint.offer(self.parties(link, KEY, pairs, **options))

    def accept(self, link: str, offer: Any, key: bytes = KEY) -> Any:
        made, answer = self.endpoint.accept(self.parties(link, key), offer)
        self._took(made)
        return answer

    def establish(self, link: str, answer: Any) -> None:
        self._took(self.endpoint.establish(self.parties(link, KEY), answer))

    def _took(self, link: RdmaLink) -> None:
        self.link = link
        lost: list[str] = []
        self.lost = lost
        link.on_lost = lost.append

    def ready(self) -> Any:
        assert self.link is not None
        self.link.ready(WAIT_S)
        return dict(self.link.detail)

    def bytes_of(self, name: str, length: int | None = None) -> bytes:
        return bytes(memoryview(self.memory[name])[:length])

    def order(
        self,
        kind: Literal["read", "write"],
        copies: Sequence[tuple[str, int, Told, int, int]],
        imm: int | None = None,
    ) -> int:
        """Copies are (local name, offset there, remote region, offset there, length)."""
        assert self.link is not None
        remotes = {told["name"]: RemoteRegion(**told) for _, _, told, _, _ in copies}
        made = [
            Copy(self.regions[name], local, remotes[told["name"]], remote, length)
            for name, local, told, remote, length in copies
        ]
        ticket, done = self._ticket()
        self.link.order(kind, made, done, imm=imm)
        return ticket

    def send(self, data: bytes) -> int:
        assert self.link is not None
        ticket, done = self._ticket()
        self.link.send(memoryview(data), done)
        return ticket

    def recv(self, room: int) -> int:
        assert self.link is not None
        ticket, done = self._ticket()
        self._into[ticket] = bytearray(room)
        self.link.recv(memoryview(self._into[ticket]), done)
        return ticket

    def recv_imm(self) -> int:
        assert self.link is not None
        ticket, done = self._ticket()
        self.link.recv_imm(done)
        return ticket

    def withdraw(self, ticket: int) -> bool:
        assert self.link is not None
        return self.link.withdraw(self._outcomes[ticket].put)

    def give_back(self, taken: bytes | int) -> None:
        assert self.link is not None
        self.link.give_back(taken)

    def outcome(self, ticket: int, within_s: float = WAIT_S) -> Outcome:
        return self._outcomes[ticket].get(timeout=within_s)

    def received(self, ticket: int) -> bytes:
        outcome = self.outcome(ticket)
        assert not outcome.code, outcome
        return bytes(self._into[ticket][: outcome.received])

    def loss(self, within_s: float = WAIT_S) -> str:
        """Why the link was lost."""
        end = time.monotonic() + within_s
        while not self.lost:
            assert time.monotonic() < end, "the link was not lost"
            time.sleep(0.01)
        return self.lost[0]

    def losses(self) -> int:
        return len(self.lost)

    def close_link(self) -> None:
        assert self.link is not None
        self.link.close()

    def close(self) -> None:
        self.endpoint.close()

    def threads(self) -> list[str]:
        return sorted(thread.name for thread in threading.enumerate())

    def _ticket(self) -> tuple[int, Callable[[Outcome], None]]:
        ticket = next(self._tickets)
        outcomes = self._outcomes[ticket] = queue.Queue[Outcome]()
        return ticket, outcomes.put


class Remote:
    """A :class:`Side` in another process. Its methods may be called here."""

    def __init__(self, *args: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.rdma.sides"])
        self._calls, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._calls.send((method, args, options))
            assert self._calls.poll(2 * WAIT_S), f"{method} does not answer"
            result, error = self._calls.recv()
            assert error is None, error
            return result

        return call

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> None:
        if self.process.is_alive():
            self.close()
            self.kill()


def _serve(calls: Connection, *args: str) -> None:
    side = Side(*args)
    while True:
        method, values, options = calls.recv()
        try:
            calls.send((getattr(side, method)(*values, **options), None))
        except Exception as error:
            calls.send((None, f"{type(error).__name__}: {error}"))
