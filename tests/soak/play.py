"""A soak: processes that read and write each other's memory, and are killed meanwhile.

A mesh of its own, some processes with a peer each, and rounds of random transfers between all of them. What is looked
at in the end: every byte was right, nothing hung, the number of transfers was reached, and the processes that lived
through it, the peer-agent among them, have no more descriptors, threads, mappings or memory than after the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from computemesh.process import end
from computemesh.testing import running_mesh
from tests.soak.holdings import holdings

ROOT: Final = Path(__file__).parents[2]
ANSWER_S: Final = 300.0
CHUNK: Final = 500
"""Transfers that a process is told to do at a time."""
SETTLED: Final = 0.05
"""The part of all transfers after which processes have what they need."""
SPARE: Final = {"fds": 8, "threads": 4, "maps": 16, "rss_mb": 48}
"""How much more each may have at the end: caches, and what is just then under way."""


class Killed(Exception):
    """The process is not there any more."""


@dataclass
class Outcome:
    """What came of a soak."""

    transfers: int = 0
    bytes: int = 0
    kills: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    transports: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])
    held: dict[str, tuple[dict[str, int], dict[str, int]]] = field(default_factory=dict[str, Any])
    """By process: what it had after the beginning, and at the end."""

    def add(self, told: Mapping[str, Any]) -> None:
        self.transfers += told["transfers"]
        self.bytes += told["bytes"]
        self.kinds.update(told["kinds"])
        self.transports.update(told["transports"])
        self.refused.update(told["refused"])
        self.wrong += told["wrong"]

    def leaks(self) -> list[str]:
        return [
            f"{name} has {after[what]} {what}, and had {before[what]}"
            for name, (before, after) in self.held.items()
            for what in SPARE
            if after[what] > before[what] + SPARE[what]
        ]


class Peer:
    """One of the processes: its present life."""

    def __init__(self, alias: str, aliases: list[str], seed: int, environment: Mapping[str, str]) -> None:
        self.alias = alias
        self._aliases = aliases
        self._seed = seed
        self._environment = environment
        self._life = 0
        self.process: Process | None = None

    async def start(self) -> None:
        """Begins the next life."""
        self._life += 1
        words = (self.alias, str(self._life), str(self._seed * 1000 + self._life), ",".join(self._aliases))
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.soak.worker", *words),
            cwd=ROOT,
            stdin=PIPE,
            stdout=PIPE,
            env={**self._environment},
            start_new_session=True,
            limit=2**22,
        )
        if await self._line() != b"ready\n":
            raise Killed

    async def ask(self, command: str) -> dict[str, Any]:
        """What it tells after having done so.

        Raises:
            Killed: it was meanwhile.
            TimeoutError: it hangs.
        """
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(command.encode() + b"\n")
            await self.process.stdin.drain()
        line = await self._line()
        if not line:
            raise Killed
        told: dict[str, Any] = json.loads(line)
        return told

    async def _line(self) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        return await asyncio.wait_for(self.process.stdout.readline(), ANSWER_S)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def close(self) -> None:
        if self.process is not None:
            await end(self.process, grace_s=5.0)


class Play:
    """A soak under way."""

    def __init__(
        self,
        peers: list[Peer],
        others: Mapping[str, Callable[[], int]],
        transfers: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.outcome = Outcome()
        self._peers = peers
        self._others = others
        self._wanted = transfers
        self._random = random.Random(seed)
        self._say = say
        self._killed: set[str] = set()

    async def run(self, kills: int) -> Outcome:
        """All of it. The first peer is never killed.

        Raises:
            TimeoutError: a process hangs.
        """
        await asyncio.gather(*(peer.start() for peer in self._peers))
        await self._until(int(self._wanted * SETTLED), kills=1)
        before = await self._settled()
        await self._until(self._wanted, kills=kills - 1)
        after = await self._settled()
        witness = self._peers[0].alias
        self.outcome.held = {name: (before[name], after[name]) for name in (witness, *self._others)}
        return self.outcome

    async def _until(self, transfers: int, kills: int) -> None:
        """Goes on until there were so many, and kills so often on the way."""
        begun = self.outcome.transfers
        kill_at = [begun + (transfers - begun) * (nth + 1) // (kills + 2) for nth in range(kills)]

        async def drive(peer: Peer) -> None:
            while self.outcome.transfers < transfers:
                try:
                    self.outcome.add(await peer.ask(f"go {CHUNK}"))
                except Killed:
                    await self._again(peer)
                if kill_at and self.outcome.transfers >= kill_at[0]:
                    kill_at.pop(0)
                    await self._kill()

        async with asyncio.TaskGroup() as group:
            for peer in self._peers:
                group.create_task(drive(peer))

    async def _kill(self) -> None:
        peer = self._random.choice(self._peers[1:])
        self._say(f"{self.outcome.transfers:,} transfers; {peer.alias} is killed")
        self.outcome.kills += 1
        self._killed.add(peer.alias)
        await asyncio.sleep(self._random.random() * 0.2)  # in the midst of what it does
        peer.kill()

    async def _again(self, peer: Peer) -> None:
        while True:
            if peer.alias not in self._killed:
                raise RuntimeError(f"{peer.alias} has ended by itself; it has said why")
            self._killed.discard(peer.alias)
            await peer.close()
            with contextlib.suppress(Killed):  # while it started
                await peer.start()
                return

    async def _settled(self) -> dict[str, dict[str, int]]:
        """What all hold while everyone is connected with everyone."""
        held: dict[str, dict[str, int]] = {}
        for _ in range(2):
            all_told = await asyncio.gather(*(self._settle(peer) for peer in self._peers))
            for peer, told in zip(self._peers, all_told, strict=True):
                self.outcome.add(told)
                held[peer.alias] = {what: told[what] for what in SPARE}
        return {**held, **{name: holdings(pid()) for name, pid in self._others.items()}}

    async def _settle(self, peer: Peer) -> dict[str, Any]:
        while True:
            try:
                return await peer.ask("settle")
            except Killed:
                await self._again(peer)


@asynccontextmanager
async def peers_of_a_mesh(folder: Path, count: int, seed: int) -> AsyncGenerator[tuple[list[Peer], Mapping[str, Any]]]:
    """A mesh with its peer-agent, and processes that are yet to be started."""
    async with running_mesh(folder, ("control-plane", "peer-agent")) as mesh:
        environment = {**os.environ, "COMPUTEMESH_HOME": str(mesh.home.root)}
        aliases = [f"peer-{number}" for number in range(count)]
        peers = [Peer(alias, aliases, seed + number, environment) for number, alias in enumerate(aliases)]
        try:
            yield peers, {"peer-agent": lambda: mesh.pid("peer-agent")}
        finally:
            await asyncio.gather(*(peer.close() for peer in peers))


async def soak(folder: Path, transfers: int, kills: int, *, seed: int, say: Callable[[str], None]) -> Outcome:
    """A soak of four processes, with all its files in a folder."""
    async with peers_of_a_mesh(folder, 4, seed) as (peers, others):
        return await Play(peers, others, transfers, seed, say).run(kills)
