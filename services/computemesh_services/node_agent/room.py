"""Whether one more attempt fits on this machine beside those that run. Pure.

Counted is what attempts were promised, not what they happen to use: an attempt that needs its 32 GiB only later has
them then. What is not known of the machine is not bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

from computemesh.contracts.gpus import GpuShare
from computemesh.contracts.nodes import NodeAnnouncement
from computemesh.contracts.work import Assignment
from computemesh.hardware import Gpu


def shortage(asked: Assignment, running: Sequence[Assignment], node: NodeAnnouncement) -> str:
    """What is too little for *asked* beside what is *running*, in numbers; empty when it fits."""
    need = asked.requirements
    cpus = sum(other.requirements.cpus for other in running)
    ram_mb = sum(other.requirements.ram_mb for other in running)
    return (
        _short("CPUs", need.cpus, cpus, node.cpus_for_work)
        or _short("MiB of RAM", need.ram_mb, ram_mb, node.ram_mb_for_work)
        or _gpu_shortage(asked, running, node.gpus)
    )


def _short(what: str, needed: int, taken: int, there: int | None) -> str:
    if not needed or there is None or taken + needed <= there:
        return ""
    return f"{taken} of {there} {what} taken by work, needs {needed}"


def _gpu_shortage(asked: Assignment, running: Sequence[Assignment], gpus: Sequence[Gpu]) -> str:
    """Reservations are exact already; but what was granted anew may still be held by an attempt that is about to
    end here."""
    for share in asked.gpus:
        gpu = next((gpu for gpu in gpus if _is_of(share, gpu)), None)
        if gpu is None:
            return f"has no GPU {share.uuid or share.index}"
        taken = sum(held.mb for other in running for held in other.gpus if _is_of(held, gpu))
        if short := _short(f"MiB of GPU {gpu.index}", share.mb, taken, gpu.vram_total_mb):
            return short
    return ""


def _is_of(share: GpuShare, gpu: Gpu) -> bool:
    return share.uuid == gpu.uuid if share.uuid and gpu.uuid else share.index == gpu.index
