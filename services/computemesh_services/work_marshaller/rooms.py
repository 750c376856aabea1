"""What is free of one node: its CPUs, memory and GPUs, less what attempts there asked for and others use. Pure.

    free = what there is - what the attempts that are out asked for - what others use

*Others* is what heartbeats tell beyond what was asked for. What a node does not tell is not held against it.
Which GPUs an attempt really has, the gpu-orchestrator decides; here they are assumed, so that nothing is sent
where it cannot fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from computemesh.contracts.nodes import NodeHeartbeat, NodeRecord
from computemesh_services.work_marshaller.grants import WHOLE
from computemesh_services.work_marshaller.needs import NOTHING, Ask

Holder = tuple[str, int]
"""An attempt, or a replica of it."""


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Something that speaks against a node."""

    reason: str
    may_change: bool


class Room:
    """A node's resources. Changes as attempts come and go, and with heartbeats."""

    __slots__ = (
        "_asks",
        "_cpus_taken",
        "_gpus",
        "_held",
        "_outside",
        "_ram_outside",
        "_ram_taken",
        "_ram_total_mb",
        "_taken",
        "_used",
        "cpus",
        "ram_mb",
        "vram_free_mb",
    )

    def __init__(self, node: NodeRecord) -> None:
        self.cpus: Final = node.cpus_for_work
        """For all work together; None: not told."""
        self.ram_mb: Final = node.ram_mb_for_work
        """For all work together; None: not told."""
        self._ram_total_mb: Final = node.memory.total_mb if node.memory else 0
        self._gpus: Final = node.gpus
        self.vram_free_mb = 0
        """Of all GPUs together."""
        self._asks: dict[Holder, Ask] = {}
        self._held: dict[Holder, list[tuple[int, int]]] = {}
        """The GPUs, by position, that each holder is assumed to have, with the MiB of each."""
        self._cpus_taken = 0
        self._ram_taken = 0
        self._ram_outside = 0
        self._taken = [0] * len(node.gpus)
        self._outside = [0] * len(node.gpus)
        self._used: list[int] = []
        self._count_vram()

    # --- attempts ----------------------------------------------------------------------------------------------

    def take(self, holder: Holder, ask: Ask) -> None:
        """An attempt is out here. It is counted even where there is no room for it."""
        if ask is NOTHING or holder in self._asks:
            return
        self._asks[holder] = ask
        self._cpus_taken += ask.cpus
        self._ram_taken += ask.ram_mb
        if ask.gpus and self._gpus:
            self._hold(holder, ask, self._best_gpus(ask))

    def free(self, holder: Holder) -> None:
        ask = self._asks.pop(holder, None)
        if ask is None:
            return
        self._cpus_taken -= ask.cpus
        self._ram_taken -= ask.ram_mb
        for position, mb in self._held.pop(holder, ()):
            self._taken[position] -= mb
        self._count_vram()

    def _hold(self, holder: Holder, ask: Ask, positions: Sequence[int]) -> None:
        held = [(position, ask.vram_mb or self._gpus[position].vram_total_mb) for position in positions]
        self._held[holder] = held
        for position, mb in held:
            self._taken[position] += mb
        self._count_vram()

    def _best_gpus(self, ask: Ask) -> list[int]:
        """The fullest GPUs that have room; where too few have, the emptiest of the others as well."""
        suiting = [position for position, gpu in enumerate(self._gpus) if ask.suits(gpu)]
        suiting.sort(key=lambda position: (not self._has(position, ask), self._free(position), position))
        return suiting[: ask.gpus]

    def _free(self, position: int) -> int:
        return self._gpus[position].vram_total_mb - self._taken[position] - self._outside[position]

    def _has(self, position: int, ask: Ask) -> bool:
        if ask.vram_mb:
            return self._free(position) >= ask.vram_mb
        return not self._taken[position] and self._free(position) >= WHOLE * self._gpus[position].vram_total_mb

    def _count_vram(self) -> None:
        self.vram_free_mb = sum(max(0, self._free(position)) for position in range(len(self._gpus)))

    # --- heartbeats --------------------------------------------------------------------------------------------

    def told(self, beat: NodeHeartbeat) -> bool:
        """Takes over what a heartbeat says is in use, and says whether more is free than before."""
        more = False
        if beat.memory_available_mb is not None and self.ram_mb is not None:
            # What is kept from work anyway may be used by others.
            kept_mb = max(0, self._ram_total_mb - self.ram_mb)
            used_mb = self._ram_total_mb - beat.memory_available_mb
            outside = max(0, used_mb - kept_mb - self._ram_taken)
            more = outside < self._ram_outside
            self._ram_outside = outside
        if beat.gpus and self._gpus:
            used = self._uses(beat)
            if used != self._used:
                self._used = used
                before = [self._free(position) for position in range(len(self._gpus))]
                self._match(used)
                more |= any(self._free(position) > free for position, free in enumerate(before))
        return more

    def _uses(self, beat: NodeHeartbeat) -> list[int]:
        """MiB in use of each GPU, by position."""
        by_key = {use.uuid or use.index: use.vram_used_mb for use in beat.gpus}
        return [by_key.get(gpu.uuid, by_key.get(gpu.index, 0)) for gpu in self._gpus]

    def _match(self, used: list[int]) -> None:
        """Assumes the attempts to be where the use is, the largest first; what is used beyond them is others'."""
        self._taken = [0] * len(self._gpus)
        self._outside = [0] * len(self._gpus)
        holders = sorted(
            (holder for holder in self._asks if self._asks[holder].gpus),
            key=lambda holder: (-self._asks[holder].gpus, -self._asks[holder].vram_mb, holder),
        )
        for holder in holders:
            ask = self._asks[holder]
            suiting = [position for position, gpu in enumerate(self._gpus) if ask.suits(gpu)]
            suiting.sort(
                key=lambda position: (
                    not self._has(position, ask),
                    self._taken[position] - used[position],
                    self._free(position),
                    position,
                )
            )
            self._hold(holder, ask, suiting[: ask.gpus])
        self._outside = [max(0, mb - taken) for mb, taken in zip(used, self._taken, strict=True)]
        self._count_vram()

    # --- what is left ------------------------------------------------------------------------------------------

    def lacks(self, ask: Ask) -> Iterator[Refusal]:
        """What of *ask* is not free, and whether it ever could be."""
        if ask.cpus and self.cpus is not None:
            if self.cpus < ask.cpus:
                yield Refusal(f"{self.cpus} CPUs, needs {ask.cpus}", may_change=False)
            elif self.cpus - self._cpus_taken < ask.cpus:
                taken = f"{self._cpus_taken} of {self.cpus} CPUs taken by work"
                yield Refusal(f"{taken}, needs {ask.cpus}", may_change=True)
        if ask.ram_mb and self.ram_mb is not None:
            if self.ram_mb < ask.ram_mb:
                yield Refusal(f"{self.ram_mb} MiB of RAM, needs {ask.ram_mb}", may_change=False)
            elif self.ram_mb - self._ram_taken - self._ram_outside < ask.ram_mb:
                others = f" and {self._ram_outside} by others" if self._ram_outside else ""
                taken = f"{self._ram_taken} of {self.ram_mb} MiB of RAM taken by work{others}"
                yield Refusal(f"{taken}, needs {ask.ram_mb}", may_change=True)
        if ask.gpus:
            yield from self._lacks_gpus(ask)

    def _lacks_gpus(self, ask: Ask) -> Iterator[Refusal]:
        suiting = [position for position, gpu in enumerate(self._gpus) if ask.suits(gpu)]
        kind = f" with {ask.gpu_model!r} in their name" if ask.gpu_model else ""
        if len(suiting) < ask.gpus:
            size = f" with {ask.vram_mb} MiB" if ask.vram_mb else ""
            yield Refusal(f"{len(suiting)} GPUs{kind}{size}, needs {ask.gpus}", may_change=False)
            return
        free = sum(self._has(position, ask) for position in suiting)
        if free < ask.gpus:
            size = f"have {ask.vram_mb} MiB free" if ask.vram_mb else "are free"
            yield Refusal(f"{free} of {len(suiting)} GPUs{kind} {size}, needs {ask.gpus}", may_change=True)
