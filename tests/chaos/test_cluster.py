"""As ``test_chaos.py``, on three NATS servers of which one at a time is killed, with three nodes.

Goal: whatever is done to the mesh, and to one server at a time, every promise in ``history.py`` holds.
Method: everything is stored three times (R3). ``make chaos-cluster N=5`` plays 2,000 items at once, the test without it
``CHAOS_ITEMS`` of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from computemesh.testing import install_executor, running_mesh
from tests.chaos.plan import (
    ACTING,
    AGENT,
    AGENT_3,
    LEADING,
    LONGER_THAN_A_LEASE_S,
    LONGER_THAN_PATIENCE_S,
    SERVERS,
    Deed,
    make_cluster_plan,
)
from tests.chaos.play import EXECUTOR, play, seeds

ALL: Final = ("node-registry", "work-marshaller", "resource-detector", "node-agent")
AT_ONCE: Final = int(os.environ.get("CHAOS_ITEMS", "200"))


@pytest.mark.parametrize("seed", seeds(runs=1))
async def test_every_promise_holds_whatever_is_done_to_a_mesh_on_three_servers(
    tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """Two marshallers, three nodes; whatever was acknowledged survives the server that acknowledged it."""
    plan = make_cluster_plan(seed, AT_ONCE)
    environment = {
        **install_executor(tmp_path / "plugin", "square", EXECUTOR),
        "COMPUTEMESH_SLOTS": "3",
        "COMPUTEMESH_MODELS": "/nowhere",
    }
    async with running_mesh(
        tmp_path, ALL, copies={"work-marshaller": 2}, environment=environment, clustered=True, agents=("n3",)
    ) as mesh:
        await play(mesh, plan, at_once=AT_ONCE, note=record_property)


@pytest.mark.parametrize("seed", range(50))
def test_every_plan_takes_a_server_away_and_kills_the_one_that_leads(seed: int) -> None:
    """And wakes a marshaller and a node after they were given up, all while work is in flight."""
    plan = make_cluster_plan(seed, AT_ONCE)
    assert plan == make_cluster_plan(seed, AT_ONCE)
    long = {(step.deed, step.victim): step.for_s for step in plan.steps if step.for_s > LONGER_THAN_A_LEASE_S}
    assert any(long.get((Deed.AWAY, server)) for server in SERVERS)
    assert long.get((Deed.STOP, ACTING))
    assert any(long.get((Deed.STOP, agent), 0.0) > LONGER_THAN_PATIENCE_S for agent in (AGENT, AGENT_3))
    killed = {step.victim for step in plan.steps if step.deed is Deed.KILL}
    assert {LEADING, ACTING, AGENT, AGENT_3} <= killed
    moments = [step.after for step in plan.steps]
    assert moments == sorted(moments)
    assert moments[-1] < AT_ONCE
