"""What an attempt finds in its environment: which replica it is, and the GPUs that are reserved for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from computemesh.contracts.gpus import GpuShare
from computemesh.contracts.work import Assignment
from computemesh.hardware import Platform


def environment_of(asked: Assignment, platform: Platform | None) -> dict[str, str]:
    """The variables of an attempt.

    Without a reservation nothing is said of GPUs, and what the node's own environment says stands.
    """
    found: dict[str, str] = {}
    if asked.replicas > 1:
        found["COMPUTEMESH_REPLICA"] = str(asked.replica)
        found["COMPUTEMESH_REPLICAS"] = str(asked.replicas)
        found["COMPUTEMESH_PEERS"] = ",".join(asked.peers)
    if asked.reservation_id:
        found["COMPUTEMESH_RESERVATION_ID"] = asked.reservation_id
        found |= _visible(asked.gpus, platform)
    return found


def _visible(gpus: Sequence[GpuShare], platform: Platform | None) -> dict[str, str]:
    indices = ",".join(str(gpu.index) for gpu in gpus)
    if platform is Platform.ROCM:
        # By index, and only here: HIP also heeds the other two names, each counting within what the last one left.
        return {"HIP_VISIBLE_DEVICES": indices}
    named = all(gpu.uuid.startswith(("GPU-", "MIG-")) for gpu in gpus)
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in gpus) if named else indices}
