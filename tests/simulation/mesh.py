"""A mesh in virtual time, in which a seed decides everything that happens.

Two or three marshallers, a registry, node agents and a plain node, each on a machine with a clock and a network of its
own. For some seconds faults happen to them; then they stop, and within bounded time everything must have ended well.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import hashlib
import random
import traceback
from collections.abc import Callable, Generator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal
from unittest.mock import patch

import msgspec
from msgspec.structs import replace

from computemesh.bus import BusError, Stored
from computemesh.contracts import storage, work
from computemesh.contracts.base import Refused
from computemesh.contracts.work import Requirements, WorkItem
from computemesh_services.work_marshaller import reign as reigning
from computemesh_services.work_marshaller import scheduler as scheduling
from computemesh_services.work_marshaller.reign import Reign
from tests.simulation.checks import Truth, Violation, demand
from tests.simulation.parties import (
    RETRIES_MAX,
    Person,
    PlainNode,
    Served,
    a_marshaller,
    a_registry,
    an_agent,
    no_machine,
)
from tests.simulation.server import Server, Weather
from tests.simulation.world import EPOCH_S, HERE, Clock, Link, Loop, NoProgress, Process, virtual_time

# pyright: reportPrivateUsage=false

_OUTSIDE: Final = contextvars.Context()
"""Of no process."""

QUIET_FROM_S: Final = 0.5
"""Nothing fails before."""

DELAYS_S: Final = ((0.0002,), (0.0002, 0.001, 0.003), (0.001, 0.01, 0.05), (0.0005, 0.0005, 0.05))
"""How long a message is on its way, in four kinds of networks."""

END_S_MAX: Final = 120.0
"""How long after the last fault everything must have ended: less than the time a clock may have leapt, and timeouts,
all retries included."""

TAKE_OVER_S_MAX: Final = 5.0
"""How long nobody may act after the one who did was killed."""

MESSAGES_S_MAX: Final = 4000
"""Messages to the server in one second, at the worst."""

IDLE_MESSAGES_S_MAX: Final = 60
"""As above, once there is nothing to do."""

LIFE_AGAIN_S: Final = 0.3
"""After which a process that ended by itself is started again."""

Body = Served | PlainNode | Person
Fault = Literal[
    "kill", "kill soon", "halt", "halt soon", "cut", "cut up", "cut down", "reset", "server", "lose", "lose stores",
    "gaps", "behind", "refuse", "leap", "ghost", "resubmit", "drain", "crowd",
]  # fmt: skip
FAULTS: Final[tuple[Fault, ...]] = Fault.__args__  # type: ignore[attr-defined]


@dataclass(eq=False)
class Machine:
    """Where one program lives its lives."""

    name: str
    link: Link
    clock: Clock
    make: Callable[[], Body]
    process: Process | None = None
    body: Body | None = None
    lives: int = 0
    wanted: bool = True

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive


@dataclass
class Outcome:
    """Of one seed."""

    seed: int
    digest: str = ""
    """Of all that happened."""
    wrong: str = ""
    virtual_s: float = 0.0
    messages: int = 0
    items: int = 0
    faults: list[str] = field(default_factory=list[str])


class Simulation:
    """One seed."""

    def __init__(self, seed: int, *, say: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self._say = say
        self._rng = random.Random(f"plan {seed}")
        self._digest = hashlib.blake2b(digest_size=16)
        self._defects: list[str] = []
        self.loop = Loop(self._on_defect)  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
        self.server = Server(self.loop, random.Random(f"server {seed}"))
        self.truth = Truth(RETRIES_MAX)
        self.machines: dict[str, Machine] = {}
        self.loop.connect = self._connect
        self.server.on_stored = self.truth.on_stored
        self.server.on_sent = self.truth.on_sent
        self.server.log = self._log
        self._delays_s = self._rng.choice(
            ((0.0002,), (0.0002, 0.001, 0.003), (0.001, 0.01, 0.05), (0.0005, 0.0005, 0.05))
        )
        self.faults_end_s = self._rng.choice((2.5, 4.0, 4.0, 7.0, 12.0)) * self._rng.uniform(0.8, 1.2)
        self._forgetful = self._rng.random() < 0.3
        """Marshallers remember hardly any finished items."""
        self._crowded: dict[object, set[str]] = {}
        self._people: list[Person] = []
        self.outcome = Outcome(seed)

    # --- what is written down ----------------------------------------------------------------------------------------

    def _log(self, who: str, what: str, subject: str, reply: str, data: bytes) -> None:
        line = f"{self.loop.now:.6f} {who} {what} {subject} {reply}"
        self._digest.update(line.encode())
        self._digest.update(data)
        if self._say is not None:
            self._say(f"{line} {data[:300].decode(errors='replace')}")

    def log_line(self, _logger: object, _name: str, event: MutableMapping[str, Any]) -> str:
        """A line that a service logs, for :mod:`structlog`."""
        process = HERE.get()
        if self._say is not None:
            shown = " ".join(
                f"{key}={value}" for key, value in event.items() if key not in ("event", "part", "exc_info")
            )
            self._say(f"{self.loop.now:.6f} {process.name if process else '***'} log {event['event']} {shown}")
            if isinstance(error := event.get("exc_info"), BaseException):
                self._say("".join(traceback.format_exception(error)))
            elif event.get("exc_info"):
                self._say(traceback.format_exc())
        return ""

    def _note(self, what: str) -> None:
        self._log("***", what, "", "", b"")

    def _on_defect(self, where: str, error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for one in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
                self._on_defect(where, one)  # pyright: ignore[reportUnknownArgumentType]
            return
        if isinstance(error, Violation):
            raise error
        known = (BusError, OSError, asyncio.CancelledError)
        if not isinstance(error, known) and not type(error).__module__.startswith("nats"):
            self._defects.append(f"{where}: {type(error).__name__}: {error}")
            self._note(f"defect: {''.join(traceback.format_exception(error))}")

    # --- machines ----------------------------------------------------------------------------------------------------

    def _add(self, name: str, make: Callable[[], Body]) -> Machine:
        rng = random.Random(f"{name} {self.seed}")
        clock = Clock(wall_s=self._rng.uniform(-1.0, 1.0), monotonic_s=self._rng.uniform(0.0, 1e5))
        machine = self.machines[name] = Machine(name, Link(rng, self._delays_s), clock, make)
        return machine

    def _boot(self, machine: Machine) -> None:
        if machine.alive or not machine.wanted:
            return
        machine.lives += 1
        process = machine.process = Process(machine.name, machine.clock)
        body = machine.body = machine.make()

        async def live() -> None:
            await body.run()
            # Ended by itself: not from inside, since nothing of it may run afterwards.
            self.loop.call_soon(self._ended, machine, process, context=_OUTSIDE)

        self._note(f"{machine.name} starts")
        task = self.loop.start(process, live)
        task.add_done_callback(lambda done: self._live_over(machine.name, done))

    def _live_over(self, name: str, done: asyncio.Task[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self._on_defect(name, error)

    def _ended(self, machine: Machine, process: Process) -> None:
        if process.alive and not isinstance(machine.body, Person):
            self._note(f"{machine.name} ends")
            self.loop.kill(process)
            self.loop.call_later(LIFE_AGAIN_S, self._boot, machine, context=_OUTSIDE)

    async def _connect(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        process = _here()
        return await self.server.accept(process, self.machines[process.name].link, make)

    def _kill(self, machine: Machine, again_s: float) -> None:
        if machine.process is not None and machine.alive:
            self._note(f"{machine.name} is killed")
            self.loop.kill(machine.process)
            self.loop.call_later(again_s, self._boot, machine, context=_OUTSIDE)

    def _halt(self, machine: Machine, halted_s: float) -> None:
        process = machine.process
        if process is not None and process.alive and not process.halted:
            self._note(f"{machine.name} is halted")
            self.loop.halt(process)

            def go_on() -> None:
                self._note(f"{machine.name} goes on")
                self.loop.go_on(process)

            self.loop.call_later(halted_s, go_on, context=_OUTSIDE)

    # --- faults ------------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Which faults happen in this seed, when and to whom."""
        rng = self._rng
        kinds = rng.sample(FAULTS, rng.randint(1, 7)) if rng.random() < 0.95 else []
        at_s = QUIET_FROM_S
        pause_s = rng.choice((0.2, 0.6, 1.5))
        while kinds and (at_s := at_s + rng.expovariate(1 / pause_s)) < self.faults_end_s:
            kind = rng.choice(kinds)
            victims = [m for m in self.machines.values() if not isinstance(m.make(), Person)]
            if rng.random() < 0.5:
                victims = [m for m in victims if m.name.startswith("work-marshaller")]
            victim = rng.choice(victims)
            left_s = self.faults_end_s - at_s
            lasts_s = min(rng.choice((0.05, 0.3, 1.0, 2.5, 4.0, 8.0)) * rng.uniform(0.5, 1.5), left_s)
            self.outcome.faults.append(f"{at_s:.3f} {kind} {victim.name} {lasts_s:.3f}")
            self.loop.call_at(at_s, self._happen, kind, victim, lasts_s, rng.random(), context=_OUTSIDE)
        self.loop.call_at(self.faults_end_s, self._heal, context=_OUTSIDE)

    def _happen(self, kind: Fault, victim: Machine, lasts_s: float, chance: float) -> None:
        self._note(f"fault: {kind} {victim.name} {lasts_s:.3f}")
        weather, loop = self.server.weather, self.loop
        match kind:
            case "kill":
                self._kill(victim, lasts_s)
            case "kill soon":
                self._burn(victim, int(1 + chance * 150), lambda: self._kill(victim, lasts_s))
            case "halt":
                self._halt(victim, lasts_s)
            case "halt soon":
                self._burn(victim, int(1 + chance * 150), lambda: self._halt(victim, lasts_s))
            case "cut" | "cut up" | "cut down":
                for way in ("up", "down") if kind == "cut" else (kind[4:],):
                    victim.link.cut_until[way] = max(victim.link.cut_until[way], loop.now + lasts_s)
            case "reset":
                for end in victim.process.ends if victim.process is not None else ():
                    end.reset(lose_up=chance < 0.5)
            case "server":
                self._server_goes(lasts_s)
            case "lose":
                weather.lost = 0.02 + 0.2 * chance
                loop.call_later(lasts_s, setattr, weather, "lost", 0.0, context=_OUTSIDE)
            case "lose stores":
                weather.lost_store = 0.02 + 0.2 * chance
                loop.call_later(lasts_s, setattr, weather, "lost_store", 0.0, context=_OUTSIDE)
            case "gaps":
                weather.gaps = 0.02 + 0.2 * chance
                loop.call_later(lasts_s, setattr, weather, "gaps", 0.0, context=_OUTSIDE)
            case "behind":
                weather.behind = 0.5
                loop.call_later(lasts_s, setattr, weather, "behind", 0.0, context=_OUTSIDE)
            case "refuse":
                stream = self.server.streams[storage.WORK_INBOX.name if chance < 0.5 else storage.WORK.stream]
                stream.full = True
                loop.call_later(min(lasts_s, 2.0), setattr, stream, "full", False, context=_OUTSIDE)
            case "leap":
                victim.clock.wall_s += (chance - 0.5) * 40.0
            case "ghost" | "resubmit":
                self._again(chance, reports=kind == "ghost")
            case "drain":
                if isinstance(victim.body, Served) and victim.alive:
                    victim.body.stop.set()
            case "crowd":
                self.server.streams[storage.WORK_INBOX.name].crowded = True

    def _burn(self, victim: Machine, steps: int, then: Callable[[], None]) -> None:
        process = victim.process
        if process is not None:
            process.fuse = process.steps + steps
            process.on_fuse = lambda: _OUTSIDE.copy().run(then)

    def _server_goes(self, lasts_s: float) -> None:
        if self.server.up:
            self.server.crash()
            self.loop.call_later(lasts_s, self.server.restart, context=_OUTSIDE)

    def _again(self, chance: float, *, reports: bool) -> None:
        """Somebody stores an old message again."""
        kept = list(self.server.streams[storage.WORK_INBOX.name].messages.values())
        olds = [one for one in kept if (one.subject != work.SUBMIT.subject) is reports]
        olds = [one for one in olds if reports or self.truth.submissions.get(one.seq)]
        if olds and self.server.up:
            old = olds[int(chance * len(olds))]
            self._log("somebody", "→", old.subject, "", old.data)
            self.server.inject(old.subject, old.data)

    def _heal(self) -> None:
        """No more faults; what they left behind remains."""
        self._note("faults end")
        self.server.weather = Weather()
        self.server.up = True
        for stream in self.server.streams.values():
            stream.full = stream.crowded = False
        for machine in self.machines.values():
            if machine.process is not None:
                machine.process.fuse = -1
                self.loop.go_on(machine.process)
            self._boot(machine)
        self._boot(self._add("helper", lambda: an_agent("helper", self._on_defect, slots=50)))

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        gc.disable()
        modules: tuple[Any, ...] = (scheduling, reigning)
        remembered = [module.REMEMBERED_MAX for module in modules]
        if self._forgetful:
            for module in modules:
                module.REMEMBERED_MAX = 2
        try:
            with virtual_time(self.loop, self.seed), no_machine(), self._rejections():
                self._run()
        except (Violation, NoProgress) as error:
            self.outcome.wrong = str(error)
        finally:
            for module, most in zip(modules, remembered, strict=True):
                module.REMEMBERED_MAX = most
        self.outcome.digest = self._digest.hexdigest()
        self.outcome.virtual_s = self.loop.now
        self.outcome.messages = self.server.handled
        self.outcome.items = len(self.truth.submissions)
        return self.outcome

    def _run(self) -> None:
        self._people_join()
        self._plan()
        for machine in self.machines.values():
            self.loop.call_at(self._rng.uniform(0, 0.3), self._boot, machine, context=_OUTSIDE)
        self.loop.call_later(0.25, self._look, context=_OUTSIDE)
        self.loop.run_until(self.faults_end_s)
        self._raise_defects()
        self._all_ends()
        self._nothing_remains()
        if self.seed % 2 == 0:
            self._take_over()
        self._raise_defects()

    @contextmanager
    def _rejections(self) -> Generator[None]:
        """Notes what marshallers reject: the event that tells of it may be lost."""
        reject = Reign._reject

        async def noted(reign: Reign, stored: Stored, refusal: Refused) -> None:
            demand(refusal.code != "internal", "no message meets a defect", stored, refusal)
            self.truth.rejected.add(stored.seq)
            await reject(reign, stored, refusal)

        with patch.object(Reign, "_reject", noted):
            yield

    def _people_join(self) -> None:
        rng = self._rng
        waiting_max, blacklist_after = rng.choice((100_000, 100_000, 8)), rng.choice((0, 2, 3))

        def marshaller(name: str) -> Served:
            return a_marshaller(name, self._on_defect, waiting_max=waiting_max, blacklist_after=blacklist_after)

        for number in range(rng.choice((2, 2, 3))):
            name = f"work-marshaller{number}"
            self._add(name, partial(marshaller, name))
        self._add("node-registry0", lambda: a_registry("node-registry0", self._on_defect))
        for number in range(rng.randint(1, 3)):
            name, slots = f"n{number}", rng.randint(1, 3)
            self._add(name, partial(an_agent, name, self._on_defect, slots=slots))
        for number in range(rng.choice((0, 0, 1))):
            name = f"plain{number}"
            self._add(name, partial(self._plain_node, name))
        self._add("person", self._person)

    def _plain_node(self, name: str) -> PlainNode:
        return PlainNode(name, random.Random(f"{name} {self.seed}"))

    def _person(self) -> Person:
        rng = random.Random(f"person {self.seed}")
        plans: list[tuple[float, str, WorkItem]] = []
        ids: list[str] = []
        for number in range(rng.randint(3, 25)):
            at_s = rng.uniform(0.3, self.faults_end_s)
            item = _an_item(rng, f"w{number}" if rng.random() < 0.9 else None)
            if ids and rng.random() < 0.15:
                item = replace(item, after=rng.sample(ids, min(len(ids), rng.randint(1, 2))))
            if rng.random() < 0.05:
                item = replace(item, deadline_at=EPOCH_S + at_s + rng.uniform(0.2, 10.0))
            plans.append((at_s, "request" if item.work_id and rng.random() < 0.4 else "submit", item))
            if item.work_id is not None:
                ids.append(item.work_id)
                if rng.random() < 0.2:
                    plans.append((at_s + rng.choice((0.02, 0.3, 2.0)), "cancel", item))
                if rng.random() < 0.3:
                    plans.append((at_s + rng.uniform(0.0, 5.0), "get", item))
                if rng.random() < 0.1:
                    plans.append((at_s + rng.uniform(0.0, 8.0), "submit", item))
        plans.sort(key=lambda plan: plan[0])
        person = Person("person", plans, on_cancelled=self._on_cancelled, on_shown=self._on_shown)
        self._people.append(person)
        return person

    def _on_cancelled(self, record: work.WorkRecord) -> None:
        self.truth.cancelled(record)
        self.truth.shown(record)

    def _on_shown(self, record: work.WorkRecord) -> None:
        self.truth.shown(record)

    def _look(self) -> None:
        """What must hold of the memory of those who act."""
        for machine in self.machines.values():
            if not machine.name.startswith("work-marshaller") or (reign := _reign_of(machine)) is None:
                continue
            seats = reign.scheduler.seats
            over = {node_id for node_id, seat in seats.items() if len(seat.taken) > seat.node.slots}
            before = self._crowded.setdefault(reign, over)
            demand(over <= before, "no node gets more than its slots", over, before)
            before &= over
        self.loop.call_later(0.25, self._look, context=_OUTSIDE)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _raise_defects(self) -> None:
        demand(not self._defects, "no handler fails", *self._defects)

    def _busy(self) -> list[str]:
        said = [f"{person.name} still asks" for person in self._people[-1:] if person.left]
        return said + self.truth.unfinished()

    def _until(self, done: Callable[[], bool], within_s: float, messages_s_max: float) -> bool:
        """Lets time pass, at most so much, and bounds what is said meanwhile."""
        end_s = self.loop.now + within_s
        while not done() and self.loop.now < end_s:
            before, since_s = self.server.handled, self.loop.now
            self.loop.run_until(min(end_s, since_s + 1.0), done)
            said = self.server.handled - before
            demand(said <= messages_s_max, "nobody talks without end", f"{said} messages in a second")
        return done()

    def _all_ends(self) -> None:
        looked_s, ended = 0.0, False

        def done() -> bool:
            nonlocal looked_s, ended
            if self.loop.now - looked_s >= 0.2:
                looked_s, ended = self.loop.now, not self._busy()
            return ended

        self._until(done, END_S_MAX, MESSAGES_S_MAX)
        demand(not self._busy(), "everything ends once faults stop", *self._busy()[:5])
        self._note("all has ended")

    def _nothing_remains(self) -> None:
        self._until(lambda: not self._remains(), 15.0, MESSAGES_S_MAX)
        demand(not self._remains(), "nothing remains of what has ended", *self._remains())
        if self.seed % 4 == 1:
            self._until(lambda: False, 3.0, IDLE_MESSAGES_S_MAX + 10 * len(self.machines))

    def _remains(self) -> list[str]:
        found: list[str] = []
        acting = [machine for machine in self.machines.values() if _reign_of(machine) is not None]
        if len(acting) != 1:
            return [f"{len(acting)} act"]
        reign = _reign_of(acting[0])
        if (reign.scheduler.waiting, reign.scheduler.out) != (0, 0):
            found.append(f"{reign.scheduler.waiting} wait and {reign.scheduler.out} are out, says {acting[0].name}")
        found += [f"{seat.node.node_id} has {seat.taken}" for seat in reign.scheduler.seats.values() if seat.taken]
        for machine in self.machines.values():
            body = machine.body
            desk = getattr(body.service, "_desk", None) if isinstance(body, Served) else None
            if desk is not None and machine.alive and desk.running:
                found.append(f"{machine.name} runs {desk.running}")
        inbox = self.server.streams[storage.WORK_INBOX.name]
        if inbox.last_seq >= self.truth.passed:
            found.append(f"the floor is noted at {self.truth.passed} of {inbox.last_seq + 1}")
        return found

    def _take_over(self) -> None:
        """Another one acts soon when the one who did is killed."""
        acting = next(machine for machine in self.machines.values() if _reign_of(machine) is not None)
        acting.wanted = False
        self._kill(acting, 0.0)
        killed_s = self.loop.now
        self._until(lambda: any(map(_reign_of, self.machines.values())), 2 * TAKE_OVER_S_MAX, MESSAGES_S_MAX)
        took_s = self.loop.now - killed_s
        demand(took_s <= TAKE_OVER_S_MAX, "another marshaller takes over in time", f"{took_s:.2f} s")
        item = WorkItem(work_id="last", work_type="inference", payload={"takes_s": 0.01, "fails": 0, "fault": "node"})
        self.server.inject(work.SUBMIT.subject, msgspec.json.encode(item))
        ended = self._until(lambda: not self.truth.unfinished(), 10.0, MESSAGES_S_MAX)
        demand(ended, "whoever took over goes on", *self.truth.unfinished())


def _an_item(rng: random.Random, work_id: str | None) -> WorkItem:
    only = rng.random() < 0.05
    payload = {
        "takes_s": rng.choice((0.0, 0.05, 0.3, 0.8, 2.0)) * rng.uniform(0.5, 1.5),
        "fails": rng.choice((0, 0, 0, 0, 1, 2, 9)),
        "fault": rng.choice(("node", "node", "node", "work")),
    }
    return WorkItem(
        work_id=work_id,
        work_type="inference",
        priority=rng.randint(3, 6),
        payload=payload,
        timeout_s=rng.choice((0.4, 1.5, 3.0, 6.0)),
        retries_max=rng.choice((None, None, 0, 1)),
        owner=rng.choice(("", "a", "b")),
        replicas=1 if only else rng.choice((1,) * 9 + (2, 3)),
        requirements=Requirements(node_id="n0") if only else Requirements(),
    )


def _reign_of(machine: Machine) -> Any:
    """The reign of a marshaller that acts."""
    body = machine.body
    if not machine.alive or not isinstance(body, Served) or body.service is None:
        return None
    return getattr(body.service, "_reign", None)


def _here() -> Process:
    process = HERE.get()
    assert process is not None
    return process
