"""Tests of a program built on the mesh."""

from pathlib import Path
from typing import assert_type

from computemesh.bus import Bus
from computemesh.contracts.work import WorkItem, WorkRecord, WorkState
from computemesh.testing import RunningMesh, running_mesh, until


async def use(folder: Path) -> None:
    async with running_mesh(folder, ["node-registry"]) as mesh:
        assert_type(mesh, RunningMesh)
        assert_type(await mesh.bus(), Bus)
        sent = await mesh.submit(WorkItem(work_type="toy"))
        assert_type(sent, WorkRecord)
        assert_type(await mesh.record(sent.work_id, {WorkState.RUNNING}), WorkRecord)
        await until(lambda: bool(mesh.lines), what="a log line")
        await until(lambda: bool(mesh.lines))  # expect: call-arg reportCallIssue
        await mesh.submit({"work_type": "toy"})  # expect: arg-type reportArgumentType
    async with running_mesh(str(folder)):  # expect: arg-type reportArgumentType
        pass
