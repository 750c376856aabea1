"""The flows that every comparison starts from: plain nats-py, and the mesh.

raw(1)        submit -> work-queue stream -> fetch(1), ack, core publish "done"
raw(32)       the same with fetch(32): the throughput a careful worker on plain nats-py reaches
raw(pull)     the same with a continuous pull, without batches
mesh          submit -> COMPUTE_WORK -> placed, recorded, delivered -> report -> recorded -> state event,
              with a bare subscriber as the node, so that nothing but the mesh is measured
mesh, direct  the same with a node that acknowledges each delivery, as the node-agent does
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from computemesh.contracts.base import Role
from computemesh.testing import running_mesh
from computemesh.testing.mesh import CONTROL_PLANE
from tests.bench.harness import Flow, OpenFlow, client, program
from tests.bench.servers import nats_server

ON_NATS: Final = "tests.bench.programs.on_nats"


@asynccontextmanager
async def raw(folder: Path, *, batch: int) -> AsyncGenerator[Flow]:
    """Plain nats-py with fetch(batch); 0 is a continuous pull."""
    async with (
        nats_server(folder) as (url, server),
        program(ON_NATS, "raw-worker", str(batch), url=url) as worker,
        client(ON_NATS, "raw-client", url=url) as submitter,
    ):
        yield Flow(submitter, {"client": submitter.pid, "nats-server": server, "worker": worker.pid})


@asynccontextmanager
async def mesh(folder: Path, *, node: str) -> AsyncGenerator[Flow]:
    """The mesh without a node agent, with a node of the bench instead."""
    async with running_mesh(folder, CONTROL_PLANE) as running:
        url = await running.invite("bench")
        async with (
            program(ON_NATS, node, url=url) as worker,
            client(ON_NATS, "mesh-client", url=running.url(Role.CLIENT)) as submitter,
        ):
            services = {name: running.pid(name) for name in ("nats-server", *CONTROL_PLANE)}
            yield Flow(submitter, {"client": submitter.pid, "node": worker.pid, **services})


FLOWS: Final[Mapping[str, OpenFlow]] = {
    "raw(1)": partial(raw, batch=1),
    "raw(32)": partial(raw, batch=32),
    "raw(pull)": partial(raw, batch=0),
    "mesh": partial(mesh, node="bare-node"),
    "mesh, direct": partial(mesh, node="direct-node"),
}
