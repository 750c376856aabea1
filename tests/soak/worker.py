"""One process of a soak: offers regions, reads and writes those of the others, and looks at every byte.

``python -m tests.soak.worker ALIAS LIFE SEED ALIASES`` is told what to do line by line: ``go N`` moves N times
something, ``settle`` connects to all others and reads from each, ``end`` ends; the answer is a line of JSON. What is
wrong is told, and does not end it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from computemesh.peer import PeerAgent, PeerConnection, PeerError, start_peer_agent
from computemesh.peer.futures import ImmFuture, MessageFuture, PeerFuture, TransferFuture
from computemesh.peer.memory import SharedMemory
from tests.soak.holdings import holdings
from tests.soak.pattern import GENERATIONS, SHORT, SIZE, WORD, Patterns, Tag, address_of, tag_in

WAIT_S: Final = 60.0
"""Whatever takes longer hangs."""
CONNECT_S: Final = 20.0
LISTEN_S: Final = 0.05
PAUSE_S: Final = 0.3
"""After a peer was not there, until it is looked for again."""
MESSAGE_MAX: Final = 256 * 2**10
MESSAGES: Final = (SIZE - MESSAGE_MAX) // WORD
"""A message begins at the word of its number, and those begin again after so many."""
SLOTS: Final = 64
SLOT: Final = 4096
"""The last so many bytes of an inbox are for writes that come with a number."""
WRITABLE: Final = SIZE - SLOTS * SLOT
GUARD: Final = 64
UNTOUCHED: Final = bytes([0xEE]) * GUARD
REMEMBERED: Final = 16
EPOCHS: Final = 64

GONE: Final = frozenset(
    {
        "cancelled",
        "closed",
        "crossed",
        "link_lost",
        "no_link",
        "no_peer",
        "not_connected",
        "not_found",
        "timed_out",
        "unavailable",
    }
)
"""What may be said where a process was killed."""
RENEWED: Final = frozenset({"stale_epoch", "no_region"})
"""What may be said where a region was just registered again."""

REGIONS: Final = ("shared", "private")


@dataclass
class Facts:
    """What came of it, since it was last told."""

    transfers: int = 0
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    transports: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Written:
    """Bytes that are in an inbox, as far as its writer knows."""

    at: int
    length: int
    tag: Tag
    source: int
    """Where they began in the region of that tag."""

    def meets(self, at: int, length: int) -> bool:
        return at < self.at + self.length and self.at < at + length


class Side:
    """What this process knows of one other."""

    def __init__(self, alias: str, number: int) -> None:
        self.alias = alias
        self.number = number
        self.not_before_s = 0.0
        self.epochs: dict[str, dict[int, Tag]] = {}
        """By region: what the last epochs had. It is the same whenever it is read."""
        self.forget()

    def forget(self) -> None:
        """A new connection begins anew."""
        self.connection: PeerConnection | None = None
        self.written: list[Written] = []
        self.sent = 0
        self.received = 0
        self.numbered = 0
        self.heard = 0
        self.message: MessageFuture | None = None
        self.imm: ImmFuture | None = None


@dataclass(frozen=True)
class Order:
    """A read that is under way."""

    side: Side
    name: str
    pieces: list[tuple[int, int, int]]
    """Where to, where from, how many bytes."""
    oldest: int
    """The newest epoch that was seen before; none below may come."""
    future: TransferFuture


class Worker:
    """A process of a soak."""

    def __init__(self, alias: str, life: int, seed: int, aliases: list[str]) -> None:
        self.alias = alias
        self.number = aliases.index(alias)
        self.life = life
        self.random = random.Random(seed)
        self.patterns = Patterns()
        self.facts = Facts()
        self.sides = {other: Side(other, number) for number, other in enumerate(aliases) if other != alias}
        self.agent: PeerAgent = start_peer_agent(alias=alias, scope="soak")
        self.generations: dict[str, int] = dict.fromkeys((*REGIONS, "out"), 0)
        self.memory: dict[str, memoryview] = {}
        for name in ("into-shared", "out-shared"):
            self.memory[name] = self.agent.allocate_memory_region(name, SIZE).view
        for name in ("into-private", "out-private"):
            self.memory[name] = memoryview(bytearray(SIZE))
            self.agent.register_memory_region(name, self.memory[name])
        self.memory["private"] = memoryview(bytearray(SIZE))
        for other in self.sides:
            inbox = f"from-{other}"
            if self.number % 2:
                self.memory[inbox] = self.agent.allocate_memory_region(inbox, SIZE).view
            else:
                self.memory[inbox] = memoryview(bytearray(SIZE))
                self.agent.register_memory_region(inbox, self.memory[inbox])
        self.messages = {other: bytearray(MESSAGE_MAX) for other in self.sides}
        for name in REGIONS:
            self.renew(name)
        self.renew_out()

    # --- what this process offers ---------------------------------------------------------------------------------

    def tag(self, name: str) -> Tag:
        number = (*REGIONS, "out").index(name)
        return Tag(self.number, number, self.life, self.generations[name])

    def renew(self, name: str) -> None:
        """The region under this name gets other bytes, and is registered again."""
        self.generations[name] = (self.generations[name] + 1) % GENERATIONS
        bytes_to_be = self.patterns.whole(self.tag(name))
        self.agent.unregister_memory_region(name)
        if name == "shared" and (name not in self.memory or self.random.random() < 0.5):
            self.memory[name] = SharedMemory.allocate(SIZE).view()
        self.memory[name][:] = bytes_to_be
        self.agent.register_memory_region(name, self.memory[name])

    def renew_out(self) -> None:
        """What is written to others gets other bytes; nothing is under way then."""
        self.generations["out"] = (self.generations["out"] + 1) % GENERATIONS
        for name in ("out-shared", "out-private"):
            self.memory[name][:] = self.patterns.whole(self.tag("out"))

    # --- connections ----------------------------------------------------------------------------------------------

    def connected(self, side: Side) -> bool:
        """Connects, if it is not, and says whether it is now."""
        if side.connection is not None and side.connection.is_connected():
            return True
        if time.monotonic() < side.not_before_s:
            return False
        side.forget()
        transport = "tcp" if (self.number + side.number) % 3 == 0 else "auto"
        try:
            side.connection = self.agent.connect_to(side.alias, transport=transport).wait(CONNECT_S)
        except (PeerError, TimeoutError) as error:
            self.failed(side, error, "connect")
            return False
        self.facts.kinds["connected"] += 1
        return True

    def failed(self, side: Side, error: Exception, what: str) -> None:
        """Takes note of what went wrong; what may not go wrong is told."""
        code = error.code if isinstance(error, PeerError) else "hangs"
        self.facts.refused[f"{what}: {code}"] += 1
        if code in GONE:
            side.not_before_s = time.monotonic() + PAUSE_S
            if side.connection is not None and not side.connection.is_connected():
                side.forget()
        elif code not in RENEWED and not (code == "hangs" and what == "connect"):
            self.wrong(f"{what} {side.alias}: {error!r}")

    def wrong(self, what: str) -> None:
        self.facts.wrong.append(f"{self.alias}, life {self.life}: {what}")

    def ended(self, side: Side, future: PeerFuture, what: str) -> bool:
        """Waits for it, and says whether it went well."""
        until = time.monotonic() + WAIT_S
        try:
            # Whoever waits goes on listening: the other side may wait for that.
            while future.wait_for(LISTEN_S) is None:
                self.listen_to_all()
                if time.monotonic() > until:
                    raise TimeoutError(f"not done after {WAIT_S:g} s")
        except (PeerError, TimeoutError) as error:
            self.failed(side, error, what)
            return False
        self.facts.transfers += 1
        self.facts.kinds[what] += 1
        if isinstance(future, TransferFuture):
            self.facts.transports[future.transport] += 1
        return True

    # --- what is moved --------------------------------------------------------------------------------------------

    def length(self, most: int) -> int:
        """1 byte to *most*, the small ones far more often."""
        chance = self.random.random()
        if chance < 0.02:
            return most
        return min(most, int(2 ** self.random.uniform(0, 22 if chance < 0.2 else 14)))

    def read(self, sides: list[Side], times: int) -> None:
        """Reads from several at once, in one or more pieces each, into places that do not touch."""
        into = self.random.choice(("into-shared", "into-private"))
        under_way: list[Order] = []
        place = GUARD
        for _ in range(times):
            side = self.random.choice(sides)
            name = self.random.choice(REGIONS)
            pieces: list[tuple[int, int, int]] = []
            for _ in range(self.random.choice((1, 1, 1, 2, 4))):
                length = self.length(SIZE - place - 4 * GUARD)
                if length < 1:
                    break
                offset = self.random.randint(0, SIZE - length)
                pieces.append((place, offset, length))
                place += length + GUARD
                if length < SHORT:
                    # It may have no whole word: one that lies around it comes along, and says whose it is.
                    pieces.append((place, min(offset // WORD * WORD, SIZE - 2 * WORD), 2 * WORD))
                    place += 2 * WORD + GUARD
            if not pieces:
                break
            for where, _, length in pieces:
                self.memory[into][where - GUARD : where] = UNTOUCHED
                self.memory[into][where + length : where + length + GUARD] = UNTOUCHED
            try:
                future = self.agent.read(side.alias, [(into, name, *piece) for piece in pieces])
            except PeerError as error:
                self.failed(side, error, "read")
                continue
            under_way.append(Order(side, name, pieces, max(side.epochs.get(name, (0,))), future))
        for order in under_way:
            if self.ended(order.side, order.future, "read"):
                self.look(order, into)
            for where, _, length in order.pieces:
                before = bytes(self.memory[into][where - GUARD : where]) == UNTOUCHED
                after = bytes(self.memory[into][where + length : where + length + GUARD]) == UNTOUCHED
                if not (before and after):
                    self.wrong(f"a read of {length} bytes to {where} has written beside them")

    def look(self, order: Order, into: str) -> None:
        """Compares what was read: of one epoch there is one generation, and later ones have higher epochs."""
        side, name, pieces, epochs, oldest = order.side, order.name, order.pieces, order.future.epochs, order.oldest
        if len(epochs) != len(pieces):
            self.wrong(f"{len(epochs)} epochs are told of {len(pieces)} pieces")
            return
        told = side.epochs.setdefault(name, {})
        for (place, offset, length), epoch in zip(pieces, epochs, strict=True):
            found = tag_in(self.memory[into][place : place + length], offset)
            if found is not None and told.setdefault(epoch, found) != found:
                self.wrong(f"epoch {epoch} of {name} of {side.alias} is {found}, and was {told[epoch]}")
        if [told[epoch] for epoch in sorted(told)] != sorted(told.values()):
            self.wrong(f"epochs of {name} of {side.alias} do not rise with what it has: {told}")
        if min(epochs) < oldest:
            self.wrong(f"epoch {min(epochs)} of {name} of {side.alias} was read after {oldest}")
        for (place, offset, length), epoch in zip(pieces, epochs, strict=True):
            self.facts.bytes += length
            what = f"{length} bytes at {offset} of {name} of {side.alias}"
            data = self.memory[into][place : place + length]
            tag = told.get(epoch)
            if tag is None:
                self.wrong(f"{what} have no tag: {bytes(data[:24]).hex()}")
            elif (tag.owner, tag.region) != (side.number, REGIONS.index(name)):
                self.wrong(f"{what} are of {tag}")
            elif not self.patterns.matches(data, tag, offset):
                self.wrong(f"{what} are not all of {tag}")
        side.epochs[name] = dict(sorted(told.items())[-EPOCHS:])

    def write(self, side: Side) -> None:
        """Writes some bytes into the inbox there; now and then reads back what was written, now or before."""
        out = self.random.choice(("out-shared", "out-private"))
        length = self.length(WRITABLE)
        at, source = self.random.randint(0, WRITABLE - length), self.random.randint(0, SIZE - length)
        side.written = [each for each in side.written if not each.meets(at, length)]
        try:
            future = self.agent.write(side.alias, (out, f"from-{self.alias}", source, at, length))
        except PeerError as error:
            self.failed(side, error, "write")
            return
        connection = side.connection
        if self.ended(side, future, "write") and side.connection is connection:
            side.written = [*side.written[-REMEMBERED:], Written(at, length, self.tag("out"), source)]
            self.facts.bytes += length
        if side.written and self.random.random() < 0.5:
            self.read_back(side, self.random.choice(side.written))

    def read_back(self, side: Side, written: Written) -> None:
        into = self.random.choice(("into-shared", "into-private"))
        try:
            future = self.agent.read(side.alias, (into, f"from-{self.alias}", 0, written.at, written.length))
        except PeerError as error:
            self.failed(side, error, "read")
            return
        if self.ended(side, future, "read"):
            self.facts.bytes += written.length
            if not self.patterns.matches(self.memory[into][: written.length], written.tag, written.source):
                self.wrong(f"{written} is not what is in the inbox at {side.alias}")

    def write_numbered(self, side: Side) -> None:
        """Writes a slot of the inbox there, with its number."""
        at = WRITABLE + side.numbered % SLOTS * SLOT
        number = side.numbered
        source = number % (WRITABLE // WORD) * WORD
        try:
            future = self.agent.write_with_imm(
                side.alias, ("out-private", f"from-{self.alias}", source, at, SLOT), imm_data=number
            )
        except PeerError as error:
            self.failed(side, error, "write_with_imm")
            return
        side.numbered += 1
        self.ended(side, future, "write_with_imm")

    def send(self, side: Side) -> None:
        source = side.sent % MESSAGES * WORD
        length = max(2 * WORD, self.length(MESSAGE_MAX))
        try:
            future = self.agent.send(side.alias, (address_of(self.memory["out-private"]), source, length))
        except PeerError as error:
            self.failed(side, error, "send")
            return
        side.sent += 1
        if self.ended(side, future, "send"):
            self.facts.bytes += length

    def listen_to_all(self) -> None:
        for side in self.sides.values():
            self.listen(side)

    def listen(self, side: Side) -> None:
        """Looks at what came from there, and waits for the next."""
        if side.message is not None and side.message.done():
            future, side.message = side.message, None
            connection = side.connection
            if self.ended(side, future, "recv") and side.connection is connection:
                self.hear(side, memoryview(self.messages[side.alias])[: future.received])
        if side.imm is not None and side.imm.done():
            imm, side.imm = side.imm, None
            connection = side.connection
            if self.ended(side, imm, "imm_recv") and side.connection is connection:
                self.hear_number(side, imm.imm_data())
        if side.connection is None or not side.connection.is_connected():
            found = self.agent.query_connection(side.alias)  # The other side may have connected.
            if found is None or not found.is_connected():
                return
            side.forget()
            side.connection = found
        try:
            if side.message is None:
                memory = self.messages[side.alias]
                side.message = self.agent.recv(side.alias, (address_of(memory), 0, len(memory)))
            if side.imm is None:
                side.imm = self.agent.imm_recv(side.alias)
        except PeerError as error:
            self.failed(side, error, "recv")

    def hear(self, side: Side, data: memoryview) -> None:
        if not self.is_next(side, data) and not (self.is_renewed(side) and self.is_next(side, data)):
            self.wrong(f"message {side.received} of {side.alias} is another one: {bytes(data[:24]).hex()}")
        side.received += 1

    def is_next(self, side: Side, data: memoryview) -> bool:
        offset = side.received % MESSAGES * WORD
        found = tag_in(data, offset)
        return found is not None and found.owner == side.number and self.patterns.matches(data, found, offset)

    def is_renewed(self, side: Side) -> bool:
        """Whether the other side connected anew between our look at the connection and a `recv` that it was for."""
        found = self.agent.query_connection(side.alias)
        if found is None or found is side.connection:
            return False
        waiting = side.message, side.imm
        side.forget()
        side.connection = found
        side.message, side.imm = waiting
        return True

    def hear_number(self, side: Side, number: int) -> None:
        if number != side.heard and not (self.is_renewed(side) and number == side.heard):
            self.wrong(f"number {number} of {side.alias} came where {side.heard} was due")
        side.heard = number + 1
        at = WRITABLE + number % SLOTS * SLOT
        data = self.memory[f"from-{side.alias}"][at : at + SLOT]
        offset = number % (WRITABLE // WORD) * WORD
        found = tag_in(data, offset)
        # A slot that was written again meanwhile has another word at its beginning.
        if found is not None and not self.patterns.matches(data, found, offset) and tag_in(data, offset) == found:
            self.wrong(f"slot {number % SLOTS} of {side.alias} is not whole when number {number} is there")

    # --- what it is told to do ------------------------------------------------------------------------------------

    def go(self, times: int) -> None:
        """Moves something so many times, or less if nobody is there."""
        until = self.facts.transfers + times
        idle_s = time.monotonic()
        while self.facts.transfers < until and time.monotonic() - idle_s < WAIT_S:
            sides = [side for side in self.sides.values() if self.connected(side)]
            self.listen_to_all()
            if not sides:
                time.sleep(0.01)
                continue
            idle_s = time.monotonic()
            side = self.random.choice(sides)
            chance = self.random.random()
            if chance < 0.60:
                self.read(sides, self.random.choice((1, 1, 2, 6)))
            elif chance < 0.85:
                self.write(side)
            elif chance < 0.90:
                self.write_numbered(side)
            elif chance < 0.991:
                self.send(side)
            elif chance < 0.996:
                self.renew(self.random.choice(REGIONS))
            elif chance < 0.998:
                self.renew_out()
            elif side.connection is not None:
                side.connection.close()
                side.forget()

    def settle(self) -> None:
        """Is connected to all others, and has read from each."""
        until = time.monotonic() + WAIT_S
        for side in self.sides.values():
            while not self.connected(side):
                if time.monotonic() > until:
                    self.wrong(f"no connection with {side.alias} in {WAIT_S:g} s")
                    break
                time.sleep(0.01)
            else:
                self.listen(side)
                self.read([side], 4)

    def told(self) -> str:
        """What came of it, and what this process has."""
        gc.collect()
        facts, self.facts = self.facts, Facts()
        return json.dumps({**vars(facts), **holdings(os.getpid())})


def main() -> None:
    alias, life, seed, aliases = sys.argv[1:]
    worker = Worker(alias, int(life), int(seed), aliases.split(","))
    print("ready", flush=True)  # noqa: T201
    while True:
        while not select.select([sys.stdin], [], [], LISTEN_S)[0]:
            worker.listen_to_all()
        command, *arguments = sys.stdin.readline().split() or ["end"]
        if command == "end":
            break
        if command == "go":
            worker.go(int(arguments[0]))
        else:
            worker.settle()
        print(worker.told(), flush=True)  # noqa: T201
    worker.agent.shutdown()


if __name__ == "__main__":
    main()
