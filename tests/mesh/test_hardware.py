"""The hardware of a node, from its drivers to what the mesh hears of it.

Goal: what a node has is announced, what changes is announced again, what is merely in use goes with heartbeats, and
a driver that breaks, vanishes or hangs costs its facts and nothing else.

Method: detector and agent as processes on a real server, with scripted hardware whose file the test edits; the test
listens as an observer does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from msgspec.structs import replace

from computemesh import __version__
from computemesh.bus import MicroService
from computemesh.contracts import nodes, resources
from computemesh.contracts.base import Role, serve
from computemesh.contracts.nodes import Discover, NodeAnnouncement, NodeHeartbeat, NodeList, NodesQuery
from computemesh.contracts.resources import Inventory, InventoryGet, Load
from computemesh.hardware import LinkKind, Platform, Tier
from computemesh.machine import machine_id
from computemesh.process import EXIT_CONFIG
from computemesh.testing import RunningMesh, install_executor, running_mesh, until
from computemesh.testing.mesh import QUICK, STRICT

EXAMPLES: Final = Path(__file__).parents[2] / "docs/examples/hardware"

NODE: Final = ("resource-detector", "node-agent")

OFTEN: Final = {
    "COMPUTEMESH_LOAD_INTERVAL_S": "0.1",
    "COMPUTEMESH_INVENTORY_INTERVAL_S": "0.1",
    "COMPUTEMESH_GPU_PATIENCE_S": "1",
    "COMPUTEMESH_MODELS": "/nowhere.gguf",
}


EXECUTOR: Final = """
from computemesh.executors import Executor

class Plugin(Executor):
    def run(self, task, progress):
        return {}
"""
"""Something to run, so that the node has slots."""


class Node:
    """A node with scripted hardware, and what the mesh hears of it."""

    def __init__(self, mesh: RunningMesh, file: Path) -> None:
        self.mesh = mesh
        self.file = file
        self.announced: list[NodeAnnouncement] = []
        self.beats: list[NodeHeartbeat] = []
        self.changed: list[Inventory] = []

    async def listen(self) -> None:
        bus = await self.mesh.bus(Role.OBSERVER)

        async def on_announce(said: NodeAnnouncement) -> None:
            self.announced.append(said)

        async def on_beat(beat: NodeHeartbeat) -> None:
            self.beats.append(beat)

        async def on_changed(found: Inventory) -> None:
            self.changed.append(found)

        await bus.subscribe(nodes.ANNOUNCE, on_announce)
        await bus.subscribe(nodes.HEARTBEAT, on_beat)
        await bus.subscribe(resources.CHANGED, on_changed, target="*")
        await bus.flush()

    async def discover(self, *node_ids: str) -> None:
        await (await self.mesh.bus(Role.SERVICES)).publish(nodes.DISCOVER, Discover(node_ids=list(node_ids)))

    async def announcement(self, condition: Callable[[NodeAnnouncement], bool], what: str) -> NodeAnnouncement:
        """The first announcement from now on that fits."""
        start = len(self.announced)
        await until(lambda: any(condition(said) for said in self.announced[start:]), what=what)
        return next(said for said in self.announced[start:] if condition(said))

    async def inventory(self) -> Inventory:
        found = await (await self.mesh.bus(Role.OBSERVER)).ask(resources.INVENTORY, InventoryGet(), target="n1")
        assert isinstance(found, Inventory)
        return found

    def edit(self, **hardware: Any) -> None:
        """Writes the file anew, at once as a whole."""
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"platform": "CUDA", **hardware}))
        new.replace(self.file)


@asynccontextmanager
async def node(folder: Path, example: str, **environment: str) -> AsyncGenerator[Node]:
    file = folder / "hardware.json"
    file.write_bytes((EXAMPLES / example).read_bytes())
    settings = {
        "COMPUTEMESH_GPU_PROVIDER": "scripted",
        "COMPUTEMESH_SCRIPTED_HARDWARE": str(file),
        **OFTEN,
        **install_executor(folder / "plugin", "nothing", EXECUTOR),
        **environment,
    }
    async with running_mesh(folder, NODE, environment=settings) as mesh:
        one = Node(mesh, file)
        await one.listen()
        yield one


def card(**facts: Any) -> dict[str, Any]:
    return {"name": "NVIDIA L40S", "vram_total_mb": 46068, "compute_capability": "8.9", "processes": [], **facts}


async def test_a_node_announces_what_it_has_and_heartbeats_tell_what_is_in_use(tmp_path: Path) -> None:
    """And both say that it is made up."""
    async with node(tmp_path, "rtx4090x2.json", COMPUTEMESH_MACHINE_ID="machine-7") as one:
        await one.discover("n1")
        said = await one.announcement(lambda said: bool(said.gpus), "the announcement")
        assert (said.tier, said.platform, said.provider) == (Tier.GPU_PEER, Platform.CUDA, "scripted")
        assert (said.machine_id, said.version) == ("machine-7", __version__)
        assert [(gpu.index, gpu.vram_total_mb, gpu.driver) for gpu in said.gpus] == [
            (0, 24564, "550.54.15"),
            (1, 24564, "550.54.15"),
        ]
        assert [link.kind for link in said.gpu_links] == [LinkKind.PHB]
        await until(lambda: any(beat.gpus for beat in one.beats), what="a heartbeat with GPUs")
        beat = next(beat for beat in one.beats if beat.gpus)
        assert [(gpu.vram_used_mb, gpu.utilization_percent) for gpu in beat.gpus] == [(18432, 87), (0, 0)]
        assert [process.memory_mb for process in beat.gpus[0].processes or ()] == [18000]
        assert beat.sent_at is not None
        assert abs(beat.sent_at - time.time()) < 60
        found = await one.inventory()
        assert (found.provider, found.tier, found.gpu_links) == ("scripted", Tier.GPU_PEER, said.gpu_links)


async def test_the_machine_is_named_by_a_hash(tmp_path: Path) -> None:
    """Where nobody names it."""
    async with node(tmp_path, "rtx4070.json") as one:
        await one.discover("n1")
        assert (await one.announcement(lambda said: True, "the announcement")).machine_id == machine_id(
            one.mesh.home.root
        )


async def test_hardware_that_changes_is_announced_and_use_is_not(tmp_path: Path) -> None:
    """Use goes with heartbeats alone."""
    async with node(tmp_path, "rtx4070.json") as one:
        one.edit(gpus=[card(vram_used_mb=100, count=2)])
        await one.announcement(lambda said: len(said.gpus) == 2, "two GPUs")
        await until(lambda: bool(one.beats) and len(one.beats[-1].gpus) == 2, what="a heartbeat with two GPUs")
        announced, changed = len(one.announced), len(one.changed)
        for used_mb in (200, 300, 400):
            one.edit(gpus=[card(vram_used_mb=used_mb, count=2)])
            await until(lambda mb=used_mb: one.beats[-1].gpus[1].vram_used_mb == mb, what=f"{used_mb} MiB")  # type: ignore[misc]
        assert (len(one.announced), len(one.changed)) == (announced, changed)
        one.edit(gpus=[card(vram_used_mb=400)])
        gone = await one.announcement(lambda said: len(said.gpus) == 1, "one GPU")
        assert gone.tier is Tier.AI_FACTORY
        metrics = await scraped(one.mesh)
        assert metrics.count("computemesh_gpu_memory_used_bytes{") == 1


async def test_what_the_detector_says_is_announced_only_where_it_is_another_machine(tmp_path: Path) -> None:
    """It says it again when it starts again, with other use."""
    async with node(tmp_path, "rtx4070.json", COMPUTEMESH_INVENTORY_INTERVAL_S="3600") as one:
        await one.discover("n1")
        await one.announcement(lambda said: bool(said.gpus), "the announcement")
        found = await one.inventory()
        bus = await one.mesh.bus(Role.NODE)
        count = len(one.announced)
        (gpu,) = found.gpus
        for used_mb, total_mb in ((1, gpu.vram_total_mb), (2, gpu.vram_total_mb), (3, 24_564)):
            gpu = replace(gpu, vram_used_mb=used_mb, vram_total_mb=total_mb)
            memory = replace(found.memory, available_mb=used_mb)
            said = replace(found, gpus=[gpu], memory=memory, cpu=replace(found.cpu, frequency_mhz=used_mb))
            await bus.publish(resources.CHANGED, said, target="n1")
        await until(lambda: len(one.announced) > count, what="the announcement of another GPU")
        assert [said.gpus[0].vram_total_mb for said in one.announced[count:]] == [24_564]


async def test_what_the_detector_of_another_machine_says_in_this_nodes_name_does_not_count(tmp_path: Path) -> None:
    """Else a machine that joins with another's invitation is refused, and the other announces its hardware."""
    async with node(tmp_path, "rtx4070.json") as one:
        await one.discover("n1")
        mine = await one.announcement(lambda said: bool(said.gpus), "the announcement")
        found = await one.inventory()
        assert found.machine_id == mine.machine_id != ""
        bus = await one.mesh.bus(Role.NODE)
        other = replace(found, gpus=[], tier=Tier.CPU_ONLY, machine_id="another")
        await bus.publish(resources.CHANGED, other, target="n1")
        load = Load(node_id="n1", cpu_percent=1.0, memory_available_mb=7, machine_id="another")
        for _ in range(20):
            await bus.publish(resources.LOAD, load, target="n1")
            await one.discover("n1")
            await asyncio.sleep(0.01)
        count = len(one.announced)
        await one.discover("n1")
        await until(lambda: len(one.announced) > count, what="the answer")
        assert {said.tier for said in one.announced if said.platform} == {Tier.GPU_INFRA}
        assert 7 not in {beat.memory_available_mb for beat in one.beats}


async def test_an_agent_that_the_detector_of_another_machine_answers_asks_until_its_own_does(tmp_path: Path) -> None:
    """Both answer in the name of the node."""
    async with node(tmp_path, "rtx4070.json", COMPUTEMESH_INVENTORY_INTERVAL_S="3600") as one:
        found = await one.inventory()
        bus = await one.mesh.bus(Role.NODE)

        async def answer(_: InventoryGet) -> Inventory:
            return replace(found, gpus=[], tier=Tier.CPU_ONLY, machine_id="another")

        other = MicroService(bus, name="resource-detector", description="", metadata={})
        for _ in range(4):  # The agent's own detector is the likeliest to be asked only after a while.
            await other.add(serve(resources.INVENTORY, answer, target="n1"))
        await bus.flush()
        one.mesh.kill("node-agent")
        said = await one.announcement(lambda said: bool(said.gpus), "its own hardware")
        assert said.gpus[0].vram_total_mb == found.gpus[0].vram_total_mb
        await other.drain()


async def scraped(mesh: RunningMesh) -> str:
    """The metrics of the detector, once it has measured after what came before."""
    async with httpx.AsyncClient() as client:
        found = ""
        for _ in range(600):
            found = (await client.get(f"{mesh.http('resource-detector')}/metrics")).text
            if found.count("computemesh_gpu_memory_total_bytes{") == 1:
                break
            await asyncio.sleep(0.05)
        return found


async def test_a_gpu_that_is_lost_is_announced_with_its_error_and_again_when_it_is_back(tmp_path: Path) -> None:
    """It is still known which one it is, and the others go on."""
    async with node(tmp_path, "rtx4070.json") as one:
        gpus = [card(uuid="GPU-a"), card(uuid="GPU-b")]
        one.edit(gpus=gpus)
        await one.announcement(lambda said: len(said.gpus) == 2, "two GPUs")
        one.edit(gpus=gpus, faults=[{"gpu": 1, "call": "nvmlDeviceGetMemoryInfo", "error": "GPU_IS_LOST"}])
        broken = await one.announcement(lambda said: any(gpu.error for gpu in said.gpus), "an error")
        assert [(gpu.uuid, gpu.error) for gpu in broken.gpus] == [("GPU-a", ""), ("GPU-b", "memory: GPU is lost")]
        await until(lambda: bool(one.beats[-1].gpus[1].error), what="a heartbeat with the error")
        one.edit(gpus=gpus)
        await one.announcement(lambda said: len(said.gpus) == 2 and not any(g.error for g in said.gpus), "two again")


async def test_a_driver_that_vanishes_leaves_a_cpu_node_and_comes_back(tmp_path: Path) -> None:
    """The inventory says why there is no GPU."""
    async with node(tmp_path, "h100x8.json") as one:
        await one.discover("n1")
        await one.announcement(lambda said: said.tier is Tier.AI_FACTORY, "eight GPUs")
        gone = {"call": "nvmlInit", "error": "DRIVER_NOT_LOADED"}
        one.edit(gpus=[card(count=8)], faults=[gone])
        without = await one.announcement(lambda said: not said.gpus, "no GPUs")
        assert (without.tier, without.platform, without.provider) == (Tier.CPU_ONLY, Platform.CPU, "scripted")
        assert (await one.inventory()).warnings == ["the NVIDIA driver does not answer: Driver Not Loaded"]
        one.edit(gpus=[card(count=8)])
        await one.announcement(lambda said: len(said.gpus) == 8, "eight again")


async def test_a_driver_that_hangs_holds_up_neither_heartbeats_nor_answers_nor_the_end(tmp_path: Path) -> None:
    """What was read before stands, with a warning that says since when; a hundred minutes are not waited for."""
    async with node(tmp_path, "rtx4090x2.json") as one:
        before = await one.inventory()
        assert len(before.gpus) == 2
        hardware = json.loads(one.file.read_text())
        one.edit(**{**hardware, "faults": [{"call": "nvmlDeviceGetCount", "hang_s": 6000}]})
        found = before
        async with asyncio.timeout(30):
            while not found.warnings:
                found = await one.inventory()
        assert "the driver of the GPUs has not answered for" in found.warnings[0]
        assert found.gpus == before.gpus
        heard = len(one.beats)
        await until(lambda: len(one.beats) > heard + 3, what="heartbeats")
        async with httpx.AsyncClient() as client:
            ready = await client.get(f"{one.mesh.http('resource-detector')}/readyz")
            assert ready.status_code == 200
        pid = one.mesh.pid("resource-detector")
    assert not alive(pid)
    assert not [line for line in one.mesh.lines if "could not finish in time" in line]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_all_that_are_asked_together_do_not_answer_at_once_and_one_that_is_named_does(tmp_path: Path) -> None:
    """The pauses before answers to everyone differ; many such questions in a row are answered once."""
    async with node(tmp_path, "rtx4070.json") as one:
        await one.discover("n1")
        await one.announcement(lambda said: True, "the first announcement")
        loop = asyncio.get_running_loop()

        async def answered(*node_ids: str) -> float:
            start = loop.time()
            asked = asyncio.create_task(one.announcement(lambda said: True, "an answer"))
            await asyncio.sleep(0)
            await one.discover(*node_ids)
            await asked
            return loop.time() - start

        spread = sorted([await answered() for _ in range(12)])
        named = sorted([await answered("n1") for _ in range(12)])
        assert spread[6] > 2 * named[6], "answers to everyone wait, on average, a quarter of a second"
        count = len(one.announced)
        for _ in range(20):
            await one.discover()
        await one.announcement(lambda said: True, "an answer to twenty questions")
        await one.discover("n1")
        await one.announcement(lambda said: True, "an answer")
        assert len(one.announced) <= count + 4
        others, heard = len(one.announced), len(one.beats)
        await one.discover("n2")
        await until(lambda: len(one.beats) > heard + 4, what="heartbeats for longer than any answer waits")
        assert len(one.announced) == others


@asynccontextmanager
async def machine(mesh: RunningMesh, name: str, **environment: str) -> AsyncGenerator[None]:
    """Another machine of the mesh: a detector and an agent with a user of their own."""
    settings = {
        **{key: value for key, value in os.environ.items() if not key.startswith("COMPUTEMESH_NATS")},
        **STRICT,
        **QUICK,
        **OFTEN,
        "NATS_URL": await mesh.invite(name),
        "COMPUTEMESH_NODE_ID": name,
        "COMPUTEMESH_HOME": str(mesh.home.root.parent / name),
        **environment,
    }
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-m", f"computemesh_services.{module}", env=settings)
        for module in ("resource_detector", "node_agent")
    ]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            await process.wait()


async def test_machines_of_every_tier_are_seen_in_one_mesh(tmp_path: Path) -> None:
    """And a question for a tier finds it and what is above."""
    plugin = install_executor(tmp_path / "plugin", "nothing", EXECUTOR)
    hardware = {"h100": "h100x8.json", "rtx4090": "rtx4090x2.json", "rtx4070": "rtx4070.json"}
    async with running_mesh(tmp_path, ["node-registry"]) as mesh, AsyncExitStack() as machines:
        for name, file in hardware.items():
            scripted = {
                "COMPUTEMESH_GPU_PROVIDER": "scripted",
                "COMPUTEMESH_SCRIPTED_HARDWARE": str(EXAMPLES / file),
            }
            await machines.enter_async_context(machine(mesh, name, **plugin, **scripted))
        await machines.enter_async_context(machine(mesh, "cpu", COMPUTEMESH_GPU_PROVIDER="none", **plugin))
        bus = await mesh.bus(Role.OBSERVER)
        wanted = {
            "h100": (Tier.AI_FACTORY, "scripted"),
            "rtx4090": (Tier.GPU_PEER, "scripted"),
            "rtx4070": (Tier.GPU_INFRA, "scripted"),
            "cpu": (Tier.CPU_ONLY, "none"),
        }
        seen: dict[str, tuple[Tier, str]] = {}
        deadline_s = asyncio.get_running_loop().time() + 60
        while seen != wanted:
            assert asyncio.get_running_loop().time() < deadline_s, seen
            found = await bus.ask(nodes.QUERY, NodesQuery())
            assert isinstance(found, NodeList)
            seen = {node.node_id: (node.tier, node.provider) for node in found.nodes}
            await asyncio.sleep(0.1)
        found = await bus.ask(nodes.QUERY, NodesQuery(min_tier=Tier.GPU_PEER))
        assert isinstance(found, NodeList)
        assert {node.node_id for node in found.nodes} == {"h100", "rtx4090"}


async def test_a_file_that_cannot_be_used_stops_the_detector_with_the_field_named(tmp_path: Path) -> None:
    """It is not started again and again."""
    file = tmp_path / "wrong.json"
    file.write_text('{"platform": "CUDA", "gpus": [{"vram_total_mb": "24 GB"}]}')
    environment = {"COMPUTEMESH_GPU_PROVIDER": "scripted", "COMPUTEMESH_SCRIPTED_HARDWARE": str(file)}
    with pytest.raises(AssertionError, match="did not start") as failure:
        async with running_mesh(tmp_path, ["resource-detector"], environment=environment):
            pass
    assert "gpus[0].vram_total_mb: Expected 'int', got 'str'" in str(failure.value)
    assert EXIT_CONFIG == 78


async def test_without_scripted_hardware_a_machine_tells_its_own(tmp_path: Path) -> None:
    """Where there is no GPU, it says so."""
    async with running_mesh(tmp_path, ["resource-detector"]) as mesh:
        found = await (await mesh.bus(Role.OBSERVER)).ask(resources.INVENTORY, InventoryGet(), target="n1")
        assert isinstance(found, Inventory)
        assert found.provider != "scripted"
        assert found.cpu.architecture
        if not found.gpus:
            assert (found.tier, found.platform, found.provider) == (Tier.CPU_ONLY, Platform.CPU, "none")
        assert {engine.name for engine in found.engines} >= {"xllamacpp"}
        assert [model.size_mb for model in found.models if model.name == "smollm2-135m-instruct"] == [93]
