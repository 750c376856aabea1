"""GPUs, and who may use them, as people see them. Pure: time is a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from computemesh.cli.common import STATE_COLOURS, lasting
from computemesh.cli.node_views import MADE_UP, MARK, model
from computemesh.cli.sizes import size
from computemesh.cli.tables import Cell, Column, clean, folded, grid
from computemesh.contracts.gpus import (
    GpuFit,
    GpuNodeState,
    GpuReservation,
    GpuReservations,
    GpuState,
    GpuStates,
    GpuVerdict,
    RamState,
    WhyNot,
)
from computemesh.contracts.nodes import NodeState
from computemesh.hardware import Gpu

HOLDERS_MAX: Final = 2
"""Reservations of one GPU that a row names."""

IDLE_SHARE: Final = 0.01
"""What a driver needs for itself is no more of a GPU than this, and nobody's."""

SOON_S: Final = 600.0
"""Memory that is used up sooner than this is marked."""

COLUMNS: Final = (
    Column(title="node"),
    Column(title="GPU", right=True),
    Column(title="name", rank=3),
    Column(title="total", right=True, rank=4),
    Column(title="used", right=True, rank=2),
    Column(title="reserved", right=True, rank=1),
    Column(title="free", right=True),
    Column(title="util", right=True, rank=6),
    Column(title="state", rank=1, least=16),
    Column(title="by whom", rank=5, least=24),
    Column(title="RAM free", rank=7),
)


def table(found: GpuStates, *, width: int, lines: int | None, now: float) -> RenderableType:
    """A row for each GPU, by node, and a line about all of them.

    Args:
        lines: how many lines there is room for; None when that does not matter.
    """
    rows = [row for node in found.nodes for row in _rows(node, now)]
    room = len(rows) if lines is None else max(1, lines - 3)
    notes = [folded(len(rows), min(room, len(rows)))] if len(found.nodes) >= found.count else [f"{found.count:,} nodes"]
    notes.append(
        f"{size(found.free_mb)} free, {size(found.reserved_mb)} reserved, of {size(found.total_mb)}"
        if found.total_mb
        else "no GPU"
    )
    if any(node.provider == MADE_UP for node in found.nodes):
        notes.append(f"{MARK} made-up hardware")
    foot = Text("; ".join(note for note in notes if note), "dim", no_wrap=True, overflow="ellipsis")
    return Group(grid(COLUMNS, rows[:room], width), foot)


def _rows(node: GpuNodeState, now: float) -> Iterator[tuple[Cell, ...]]:
    name = node.node_id + (f" {MARK}" if node.provider == MADE_UP else "")
    if not node.gpus:
        yield (name, "-", "no GPU", "-", "-", "-", "-", "-", _state(node, None), "-", ram(node.ram))
    for number, gpu in enumerate(node.gpus):
        yield (
            name,
            str(gpu.index),
            model(Gpu(name=gpu.name, mig_profile=gpu.mig_profile)),
            size(gpu.total_mb),
            _some(gpu.used_mb),
            _some(gpu.reserved_mb),
            size(gpu.free_mb),
            "-" if gpu.utilization_percent is None else f"{gpu.utilization_percent:.0f} %",
            _state(node, gpu),
            holders(gpu, now),
            "" if number else ram(node.ram),
        )


def _some(mib: int) -> str:
    return size(mib) if mib else "-"


def _state(node: GpuNodeState, gpu: GpuState | None) -> Text:
    """Whether something can be reserved of it, or why not."""
    if gpu is not None and gpu.over_mb:
        return Text(f"over by {size(gpu.over_mb)}", "bold red")
    if gpu is not None and gpu.unavailable:
        return Text(gpu.unavailable, "red")
    if node.state is not NodeState.ONLINE:
        return Text(str(node.state), STATE_COLOURS.get(node.state, "default"))
    if node.unavailable:
        return Text(node.unavailable, "magenta")
    if gpu is None:
        return Text("online", "green")
    return Text("free" if gpu.free_mb else "full", "green" if gpu.free_mb else "yellow")


def holders(gpu: GpuState, now: float) -> str:
    """Who has it: its reservations, then what is used without one."""
    said = [
        f"{holder.owner or holder.reservation_id} {size(holder.mb)} for {lasting(holder.expires_at - now)}"
        for holder in gpu.reservations[:HOLDERS_MAX]
    ]
    if more := len(gpu.reservations) - HOLDERS_MAX:
        said += [f"{more} more"] if more > 0 else []
    if gpu.external_mb > gpu.total_mb * IDLE_SHARE:
        said.append(f"others {size(gpu.external_mb)}")
    return ", ".join(said) or "-"


def ram(state: RamState) -> Text:
    """Memory of the machine, and when it is used up, if it clearly will be."""
    if not state.total_mb:
        return Text("-")
    said = Text(f"{size(state.available_mb)} of {size(state.total_mb)}")
    if state.oom_in_s is not None:
        style = "bold red" if state.oom_in_s < SOON_S else "yellow"
        said.append(f", none in {lasting(state.oom_in_s)}", style)
    return said


# --- can it be had? ----------------------------------------------------------------------------------------------

_WHY_COLUMNS: Final = (
    Column(title="node"),
    Column(title="GPU", right=True),
    Column(title="name", rank=4),
    Column(title="free", right=True, rank=1),
    Column(title="short of", right=True, rank=2),
    Column(title="reserved", right=True, rank=5),
    Column(title="others", right=True, rank=6),
    Column(title="why not", least=24),
    Column(title="may change", rank=7),
)


def fit(found: GpuFit, *, width: int) -> RenderableType:
    """Yes and where; or no, and why not of each GPU that comes close."""
    if found.can_fit:
        where = ", ".join(str(share.index) for share in found.gpus)
        plural = "s" if len(found.gpus) > 1 else ""
        return Text("yes", "bold green").append(
            f": {size(found.required_mb)} on GPU{plural} {where} of {found.node_id}", "default"
        )
    # The rest of the sentence is what the table says.
    reason = found.reason.partition(". ")[0]
    parts: list[RenderableType] = [clean(Text("no", "bold red").append(f": {reason}", "default"))]
    near = [verdict for verdict in found.why_not if verdict.code is not WhyNot.FILTER] or found.why_not
    if near:
        parts += ["", grid(_WHY_COLUMNS, [_why(alike) for alike in _alike(near)], width)]
    if found.counts:
        counts = ", ".join(f"{count:,} {code}" for code, count in found.counts.items())
        parts.append(Text(f"{sum(found.counts.values()):,} GPUs: {counts}", "dim"))
    return Group(*parts)


def _alike(verdicts: Sequence[GpuVerdict]) -> list[list[GpuVerdict]]:
    """GPUs of one node of which the same is said, together; in the order of the first of each."""
    found: dict[GpuVerdict, list[GpuVerdict]] = {}
    for verdict in verdicts:
        found.setdefault(msgspec.structs.replace(verdict, index=0, uuid=""), []).append(verdict)
    return list(found.values())


def numbers(indices: Sequence[int]) -> str:
    """Indices, those in a row together: ``0-3,6``."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _why(alike: Sequence[GpuVerdict]) -> tuple[Cell, ...]:
    verdict = alike[0]
    return (
        verdict.node_id,
        numbers([one.index for one in alike]),
        model(Gpu(name=verdict.name)),
        size(verdict.free_mb),
        _some(verdict.short_mb),
        _some(verdict.reserved_mb),
        _some(verdict.external_mb),
        verdict.reason,
        "yes" if verdict.may_change else "no",
    )


# --- reservations ------------------------------------------------------------------------------------------------

_RESERVATION_COLUMNS: Final = (
    Column(title="reservation"),
    Column(title="owner", rank=2),
    Column(title="node"),
    Column(title="GPUs", rank=1),
    Column(title="each", right=True, rank=4),
    Column(title="in all", right=True, rank=3),
    Column(title="since", right=True, rank=5),
    Column(title="ends in", right=True),
    Column(title="ends with", rank=6),
)


def reservations(found: GpuReservations, *, width: int, lines: int | None, now: float) -> RenderableType:
    """A row for each reservation."""
    room = len(found.reservations) if lines is None else max(1, lines - 3)
    shown = found.reservations[:room]
    rows = [
        (
            one.reservation_id,
            one.owner or "-",
            one.node_id,
            indices(one),
            size(one.required_mb),
            size(one.total_mb),
            lasting(now - one.granted_at),
            lasting(one.expires_at - now),
            ", ".join(_ends_with(one)) or "-",
        )
        for one in shown
    ]
    total = f"{size(sum(one.total_mb for one in found.reservations))} in {found.count:,} reservations"
    foot = "; ".join(filter(None, (folded(found.count, len(shown)), total)))
    return Group(grid(_RESERVATION_COLUMNS, rows, width), Text(foot, "dim"))


def indices(one: GpuReservation) -> str:
    """Its GPUs by index: ``0,1``."""
    return ",".join(str(share.index) for share in one.gpus)


def _ends_with(one: GpuReservation) -> Sequence[str]:
    work = [f"work {one.work_id}"] if one.work_id else []
    return [*work, f"this life of {one.node_id}"] if one.session else work


def granted(one: GpuReservation, now: float) -> Text:
    """A reservation in a line."""
    plural = "s" if len(one.gpus) > 1 else ""
    words = (
        f"  {size(one.required_mb)} of GPU{plural} {indices(one)} on {one.node_id}, "
        f"for {lasting(one.expires_at - now)} unless renewed"
    )
    return Text(one.reservation_id, "bold").append(words, "default")
