"""What an attempt needs of GPUs, as the gpu-orchestrator understands it, and which nodes it refused. Pure.

The ledger decides. The scheduler only remembers for a while what it was refused, so that an item that finds no room
tries another node, or later, instead of the same one again at once.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import msgspec

from computemesh.contracts.base import Refused
from computemesh.contracts.gpus import GpuReserve
from computemesh.contracts.nodes import NodeRecord
from computemesh.contracts.work import Requirements, WorkRecord

REST_S: Final = 1.0
REST_S_MAX: Final = 30.0
"""How long a node is left alone with what was refused there; the pause doubles while it goes on. It is over at once
when GPU memory of the node is given back."""

WHOLE: Final = 0.9
"""Share of a GPU's memory that must be free for it to be had as a whole: drivers and desktops use a little."""

RESTS_MAX: Final = 10_000
"""Refusals above which those that are long over are dropped."""

QUOTA: Final = "quota_exceeded"


def wants_gpus(need: Requirements) -> bool:
    return need.gpus > 0 or need.vram_mb > 0 or bool(need.gpu_model)


def reservation_id(work_id: str, attempt: int, replica: int) -> str:
    """The same whoever asks, so that asking again after a crash is the same reservation."""
    return "w-" + blake2b(f"{work_id} {attempt} {replica}".encode(), digest_size=12).hexdigest()


def terms(record: WorkRecord, replica: int, node: NodeRecord) -> GpuReserve:
    """What to reserve for a replica on *node*.

    Without `vram_mb` it is the whole of each GPU, but for a little: on a node whose GPUs differ, that of the smallest.
    """
    need = record.requirements
    fit = [gpu.vram_total_mb for gpu in node.gpus if need.gpu_model.lower() in gpu.name.lower() and not gpu.error]
    return GpuReserve(
        reservation_id=reservation_id(record.work_id, record.attempt, replica),
        node_id=node.node_id,
        session=node.session,
        work_id=record.work_id,
        owner=record.owner,
        gpu_count=max(1, need.gpus),
        required_mb=max(1, need.vram_mb or int(WHOLE * min(fit, default=1))),
        gpu_model=need.gpu_model,
        prefer_nvlink=need.gpus > 1,
    )


class _Rest(msgspec.Struct):
    until: float
    times: int
    reason: str


_Key = tuple[str, int, int, str, str]
"""Node, GPUs, MiB, model, owner: what was refused where. Without a node for an owner that is over its quota."""


class Refusals:
    """What the ledger refused lately."""

    def __init__(self) -> None:
        self.away = ""
        """Why no GPU can be reserved at all; empty while the gpu-orchestrator answers."""
        self._rests: dict[_Key, _Rest] = {}

    def add(self, record: WorkRecord, node_id: str, refused: Refused, now: float) -> float:
        """Takes note of a refusal. Gives the time, Unix seconds, from which it may be tried again."""
        need = record.requirements
        key = _of_owner(need, record.owner) if refused.code == QUOTA else _of_node(need, node_id)
        rest = self._rests.get(key)
        times = rest.times + 1 if rest and now < rest.until + REST_S_MAX else 0
        until = now + min(REST_S_MAX, REST_S * 2.0 ** min(times, 30))
        if len(self._rests) >= RESTS_MAX:
            self.tidy(now)
        self._rests[key] = _Rest(until, times, refused.reason)
        return until

    def is_over_quota(self, need: Requirements, owner: str, now: float) -> bool:
        """Whether the owner gets no such GPUs anywhere now."""
        rest = self._rests.get(_of_owner(need, owner)) if self._rests else None
        return rest is not None and now < rest.until

    def why_not(self, need: Requirements, owner: str | None, node_id: str, now: float) -> str:
        """Why no GPUs of a node are asked for now; empty when they may be."""
        if self.away:
            return self.away
        if not self._rests:
            return ""
        keys = [_of_node(need, node_id)] if owner is None else [_of_node(need, node_id), _of_owner(need, owner)]
        for key in keys:
            if (rest := self._rests.get(key)) and now < rest.until:
                return rest.reason
        return ""

    def given_back(self, node_id: str, owner: str) -> bool:
        """GPU memory of a node is free again: what was refused there, or to its owner, may be asked for anew. True when
        that changes anything."""
        over = [key for key in self._rests if key[0] == node_id or (not key[0] and key[4] == owner)]
        for key in over:
            del self._rests[key]
        return bool(over)

    def tidy(self, now: float) -> None:
        """Drops what has long been over."""
        for key in [key for key, rest in self._rests.items() if now >= rest.until + REST_S_MAX]:
            del self._rests[key]


def _of_node(need: Requirements, node_id: str) -> _Key:
    return node_id, need.gpus, need.vram_mb, need.gpu_model, ""


def _of_owner(need: Requirements, owner: str) -> _Key:
    return "", need.gpus, need.vram_mb, "", owner
