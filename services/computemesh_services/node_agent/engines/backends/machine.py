"""The backends of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from computemesh_services.node_agent.engines.backends import Backend
from computemesh_services.node_agent.engines.backends.choice import Choice, Chosen, choose, served_by
from computemesh_services.node_agent.engines.backends.cpu import CpuSets, Plan
from computemesh_services.node_agent.engines.backends.cuda import Cuda
from computemesh_services.node_agent.engines.backends.metal import Metal
from computemesh_services.node_agent.engines.backends.rocm import Rocm
from computemesh_services.node_agent.engines.backends.sycl import Sycl
from computemesh_services.node_agent.engines.backends.tool import run
from computemesh_services.node_agent.engines.backends.vulkan import Vulkan
from computemesh_services.node_agent.engines.device import BackendName

LIST_DEVICES_S: Final = 30.0
"""How long llama.cpp may take to look for GPUs: it starts their drivers."""


def devices_here(wanted: Choice, *, cpu_plan: Plan, launcher: Sequence[str]) -> Chosen:
    """The devices of this machine for engines. Blocks, for seconds where a tool is slow; never raises.

    Args:
        cpu_plan: how the CPUs are split, as ``cpu.parse_plan`` has it.
        launcher: the command that starts a llama.cpp server; empty when none is installed.
    """
    backends: dict[BackendName, Backend] = {
        "cuda": Cuda(),
        "rocm": Rocm(),
        "metal": Metal(),
        "sycl": Sycl(),
        "vulkan": Vulkan(),
        "cpu": CpuSets(cpu_plan),
    }
    return choose(wanted, backends, partial(served_by, launcher, partial(run, timeout_s=LIST_DEVICES_S)))
