"""Waiting for work: one item or many followed to their ends, with a bar for each that runs, and one for all."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Final

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from computemesh.bus import Bus, BusError
from computemesh.cli import common
from computemesh.cli.common import WorkFailure, err
from computemesh.contracts import work
from computemesh.contracts.work import FINAL, WorkExplanation, WorkGet, WorkProgress, WorkRecord, WorkState

LOOK_AGAIN_S: Final = 5.0
"""How often a waiting command asks for states, in case it missed an event."""

FIRST_LOOK_S: Final = 1.0
"""The first time earlier: who waits for longer wants to know why."""

LOOKED_AT_MAX: Final = 50
"""Items asked for in one go, those first whose last word is the oldest."""

BARS_MAX: Final = 8
"""Items that have a bar of their own at the same time."""

_WAITING: Final = frozenset({WorkState.PENDING, WorkState.RETRYING})
_OUT: Final = frozenset({WorkState.ASSIGNED, WorkState.RUNNING})

_SECONDS: Final = re.compile(r"-?[\d.]+ s\b")


class Follower:
    """Follows items to their ends."""

    def __init__(self, work_ids: Sequence[str]) -> None:
        self.records: dict[str, WorkRecord] = {}
        """What was heard last of each."""
        self._open = dict.fromkeys(work_ids)
        """Those that have not ended, by when they were heard of or asked for, the longest ago first."""
        self._order = list(self._open)
        self._done = asyncio.Event()
        if not self._open:
            self._done.set()
        self._bars = Bars(self._order)
        self._said = ""
        """Why something waits, as it was said last, without the seconds in it."""

    async def subscribe(self, bus: Bus) -> None:
        """Hears of them from now on."""
        for work_id in self._order:
            await bus.subscribe(work.STATE, self.on_state, target=work_id)
        await bus.subscribe(work.PROGRESS, self.on_progress)
        await bus.flush()

    async def on_state(self, record: WorkRecord) -> None:
        self.on_record(record)

    def on_record(self, record: WorkRecord) -> None:
        # The answer to the submission may come after the outcome of a quick item.
        if record.work_id not in self._open:
            return
        self.records[record.work_id] = record
        self._heard(record.work_id)
        self._bars.moved(record)
        if record.state in FINAL:
            del self._open[record.work_id]
            if not self._open:
                self._done.set()

    async def on_progress(self, report: WorkProgress) -> None:
        if report.work_id in self._open:
            self._bars.progressed(report)

    async def wait(self, bus: Bus, timeout_s: float | None, *, live: bool, quiet: bool = False) -> list[WorkRecord]:
        """The outcomes, in the order of the ids. Says why something waits.

        Args:
            live: show bars on the terminal, else say it in lines.
            quiet: say nothing.

        Raises:
            WorkFailure: not all have ended in time.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        look_s = FIRST_LOOK_S
        with self._bars.shown(live=live and not quiet):
            while not self._done.is_set():
                left_s = look_s if until_s is None else min(look_s, until_s - time.monotonic())
                if left_s <= 0:
                    raise self._late(timeout_s or 0.0)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._done.wait(), left_s)
                    break
                if until_s is None or time.monotonic() < until_s:
                    await self._look(bus)
                    if not quiet:
                        await self._say_why(bus, live=live)
                look_s = LOOK_AGAIN_S
        return [self.records[work_id] for work_id in self._order]

    @contextlib.contextmanager
    def left_open(self) -> Generator[None]:
        """Says what goes on when the user no longer waits for it."""
        try:
            yield
        except asyncio.CancelledError:
            if taken := [work_id for work_id in self._open if work_id in self.records]:
                others = f" and {len(taken) - 1} more go on" if len(taken) > 1 else " goes on"
                common.notice(f"{taken[0]}{others}; see `computemesh work show {taken[0]}`")
            elif self._open:
                first = next(iter(self._open))
                common.notice(f"{first} may have been submitted; see `computemesh work show {first}`")
            raise

    def _late(self, timeout_s: float) -> WorkFailure:
        first = next(iter(self._open))
        what = first if len(self._order) == 1 else f"{len(self._open)} of {len(self._order)} items"
        verb = "is" if len(self._open) == 1 and len(self._order) == 1 else "are"
        goes_on = "it goes on" if verb == "is" else "they go on"
        return WorkFailure(
            f"{what} {verb} not finished after {timeout_s:g} s",
            hint=f"{goes_on}; see `computemesh work show {first}`",
            code="not_finished",
        )

    def _heard(self, work_id: str) -> None:
        del self._open[work_id]
        self._open[work_id] = None

    async def _look(self, bus: Bus) -> None:
        with contextlib.suppress(BusError):
            for work_id in list(self._open)[:LOOKED_AT_MAX]:
                answer = await bus.ask(work.GET, WorkGet(work_id=work_id))
                if isinstance(answer, WorkRecord):
                    self.on_record(answer)

    async def _say_why(self, bus: Bus, *, live: bool) -> None:
        """Why the first of those that wait does: on the terminal each time, in lines when it is another reason."""
        waiting = (work_id for work_id in self._order if work_id in self._open and self._waits(work_id))
        if (work_id := next(waiting, None)) is None:
            return
        with contextlib.suppress(BusError):
            why = await bus.ask(work.EXPLAIN, WorkGet(work_id=work_id))
            if not isinstance(why, WorkExplanation) or why.state not in _WAITING or not self._waits(work_id):
                return
            summary = common.one_line(why.summary)
            said = _SECONDS.sub("", summary)
            if live:
                self._bars.waits(work_id, summary)
            elif said != self._said:
                common.notice(f"{work_id} {summary}")
            self._said = said

    def _waits(self, work_id: str) -> bool:
        return work_id in self.records and self.records[work_id].state in _WAITING


class _BarOfWhatRuns(ProgressColumn):
    """Nothing for an item that waits."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(24)

    def render(self, task: Task) -> RenderableType:
        return self._bar.render(task) if task.fields["runs"] else Text()


class Bars:
    """The bars of one item, or those of the items that run below one for all."""

    def __init__(self, work_ids: Sequence[str]) -> None:
        self._single = work_ids[0] if len(work_ids) == 1 else ""
        self._bars: dict[str, TaskID] = {}
        self._whole: TaskID | None = None
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column()),  # Folded, not cut: it may be a sentence.
            _BarOfWhatRuns(),
            TimeElapsedColumn(),
            console=err,
            transient=True,
        )
        if self._single:
            self._bar(self._single, f"{self._single} submitted", runs=False)
        else:
            self._whole = self.progress.add_task(_ended(0, len(work_ids)), total=len(work_ids), runs=True)

    @contextlib.contextmanager
    def shown(self, *, live: bool) -> Generator[None]:
        """Shows them until the block ends."""
        self.progress.disable = not live
        with self.progress:
            yield

    def moved(self, record: WorkRecord) -> None:
        where = f" on {record.node_id}" if record.node_id else ""
        text = f"{record.work_id} {record.state}{where}"
        if self._whole is not None:
            whole = self.progress.tasks[self._whole]
            ended = int(whole.completed) + (record.state in FINAL)
            self.progress.update(self._whole, completed=ended, description=_ended(ended, int(whole.total or 0)))
        if self._single:
            self._describe(record.work_id, text, runs=record.state in _OUT)
        elif record.state in _OUT:
            self._bar(record.work_id, text, runs=True)
        elif bar := self._bars.pop(record.work_id, None):
            self.progress.remove_task(bar)

    def progressed(self, report: WorkProgress) -> None:
        self._describe(report.work_id, f"{report.work_id} running on {report.node_id}  {report.message}", runs=True)
        if report.fraction is not None and (bar := self._bars.get(report.work_id)) is not None:
            self.progress.update(bar, completed=report.fraction)

    def waits(self, work_id: str, why: str) -> None:
        if self._whole is None:
            self._describe(work_id, f"{work_id} {why}", runs=False)
            return
        whole = self.progress.tasks[self._whole]
        text = f"{_ended(int(whole.completed), int(whole.total or 0))}; {work_id} {why}"
        self.progress.update(self._whole, description=common.escape(text))

    def _bar(self, work_id: str, text: str, *, runs: bool) -> None:
        if work_id in self._bars:
            self._describe(work_id, text, runs=runs)
        elif len(self._bars) < BARS_MAX:
            self._bars[work_id] = self.progress.add_task(common.escape(text), total=1.0, runs=runs)

    def _describe(self, work_id: str, text: str, *, runs: bool) -> None:
        if (bar := self._bars.get(work_id)) is not None:
            self.progress.update(bar, description=common.escape(text), runs=runs)


def _ended(count: int, total: int) -> str:
    return f"{count} of {total} items {'has' if count == 1 else 'have'} ended"


def all_well(records: Mapping[str, WorkRecord] | Sequence[WorkRecord]) -> bool:
    """Whether none of these ended in any way but completed."""
    found = records.values() if isinstance(records, Mapping) else records
    return not any(record.state in FINAL and record.state is not WorkState.COMPLETED for record in found)
