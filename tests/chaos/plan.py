"""What is done to a mesh, and when: a list of steps that follows from a seed. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

ACTING: Final = "acting work-marshaller"
STANDBY: Final = "standby work-marshaller"
REGISTRY: Final = "node-registry"
AGENT: Final = "node-agent"
SERVER: Final = "nats-server"
VICTIMS: Final = (ACTING, STANDBY, REGISTRY, AGENT, SERVER)

AGENT_3: Final = "node-agent-n3"
SERVERS: Final = ("nats-1", "nats-2", "nats-3")
LEADING: Final = "leading nats-server"
"""Of three, the one that decides what is stored about work."""
CLUSTER_VICTIMS: Final = (ACTING, STANDBY, REGISTRY, AGENT, AGENT_3, LEADING, *SERVERS)

LONGER_THAN_A_LEASE_S: Final = 4.5
"""A holder that is stopped for this long wakes up when another replica acts."""

LONGER_THAN_PATIENCE_S: Final = 5.0
"""A node that is stopped for this long was lost, in a mesh with the settings of tests, when it wakes up."""


DEEDS: Final = 11
"""Steps of a plan."""


class Deed(StrEnum):
    KILL = "kill"
    RESTART = "restart"
    """Told to end, and started again by the supervisor."""
    STOP = "stop"
    """SIGSTOP, and SIGCONT after a while."""
    AWAY = "kill and keep away"
    """Killed, and started again after a while."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something that is done once *after* outcomes are recorded."""

    after: int
    deed: Deed
    victim: str
    for_s: float = 0.0

    def __str__(self) -> str:
        length = f" for {self.for_s:.1f} s" if self.for_s else ""
        return f"after {self.after:3} outcomes: {self.deed} {self.victim}{length}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    seed: int
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join([f"seed {self.seed}", *map(str, self.steps)])


def make_cluster_plan(seed: int, items: int) -> Plan:
    """The plan of *seed* for a mesh on three servers, three nodes and two marshallers.

    One server is away for longer than a lease, and the one that leads is killed.
    """
    dice = random.Random(seed)  # replayed, not secret
    deeds = [
        (Deed.STOP, ACTING, dice.uniform(LONGER_THAN_A_LEASE_S, 6.5)),
        (Deed.STOP, dice.choice((AGENT, AGENT_3)), dice.uniform(LONGER_THAN_PATIENCE_S, 6.5)),
        (Deed.KILL, LEADING, 0.0),
        (Deed.AWAY, dice.choice(SERVERS), dice.uniform(LONGER_THAN_A_LEASE_S, 10.0)),
        (Deed.KILL, ACTING, 0.0),
        (Deed.KILL, AGENT, 0.0),
        (Deed.KILL, AGENT_3, 0.0),
    ]
    while len(deeds) < DEEDS:
        deed = dice.choice((Deed.KILL, Deed.RESTART, Deed.STOP))
        victim = dice.choice(CLUSTER_VICTIMS[:-4] if deed is Deed.STOP else CLUSTER_VICTIMS)
        deeds.append((deed, victim, dice.uniform(0.2, 2.5) if deed is Deed.STOP else 0.0))
    return _planned(seed, dice, deeds, items)


def make_plan(seed: int, items: int) -> Plan:
    """The plan of *seed*, in proportion to the number of items.

    The order, the moments and some of the victims are random. What every plan has: each process dies at
    least once, and a leader and a node wake up after they were given up.
    """
    dice = random.Random(seed)  # replayed, not secret
    deeds = [
        (Deed.STOP, ACTING, dice.uniform(LONGER_THAN_A_LEASE_S, 6.5)),
        (Deed.STOP, AGENT, dice.uniform(LONGER_THAN_PATIENCE_S, 6.5)),
        (Deed.KILL, ACTING, 0.0),
        (Deed.KILL, AGENT, 0.0),
        (Deed.KILL, SERVER, 0.0),
        (Deed.KILL, REGISTRY, 0.0),
        (Deed.KILL, STANDBY, 0.0),
    ]
    while len(deeds) < DEEDS:
        deed = dice.choice((Deed.KILL, Deed.RESTART, Deed.STOP))
        deeds.append((deed, dice.choice(VICTIMS), dice.uniform(0.2, 2.5) if deed is Deed.STOP else 0.0))
    return _planned(seed, dice, deeds, items)


def _planned(seed: int, dice: random.Random, deeds: list[tuple[Deed, str, float]], items: int) -> Plan:
    dice.shuffle(deeds)
    moments = sorted(dice.sample(range(items // 25, items * 4 // 5), len(deeds)))
    return Plan(
        seed=seed,
        steps=tuple(
            Step(after=after, deed=deed, victim=victim, for_s=for_s)
            for after, (deed, victim, for_s) in zip(moments, deeds, strict=True)
        ),
    )
