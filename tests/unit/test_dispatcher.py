"""What a node tells a dispatcher, and what it makes of the answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from computemesh.config import ConfigError
from computemesh.contracts.base import decode, encode
from computemesh.contracts.nodes import EngineCard, EngineState, EngineUse, ModelCard
from computemesh.contracts.rolemesh import STALE_S, InventoryHost
from computemesh.hardware import Gpu, GpuUse
from computemesh_services.node_agent.dispatcher import HEARTBEAT, REGISTER, checked, pause_s, trouble
from computemesh_services.node_agent.engines.device import DeviceMetrics
from computemesh_services.node_agent.inventory import Facts, beat, inventory, registration, roles
from computemesh_services.node_registry import rolemesh

CHAT = ModelCard(name="qwen", size_mb=4_700, context_tokens=8_192, roles=["writer", "planner"])
VECTORS = ModelCard(name="bge", embeddings=True)

FACTS = Facts(
    node_id="n1",
    session="s-1",
    version="1.0",
    base_url="http://10.0.0.7:8091",
    accepting=True,
    labels={"zone": "a"},
    host=InventoryHost(hostname="box", cpu_threads=16, cpu_percent=7.5, memory_total_mb=65_536),
    cards=[
        EngineCard(device="gpu:0", backend="cuda", name="RTX 4090", slots=2, pending_max=4),
        EngineCard(device="cpu:0", slots=1, pending_max=2),
    ],
    uses=[
        EngineUse(device="gpu:0", state=EngineState.READY, model="qwen", pending=3, tokens_per_s=41.5, restarts=1),
        EngineUse(device="cpu:0", state=EngineState.FAILED, model="bge"),
    ],
    metrics={
        "gpu:0": DeviceMetrics(
            memory_total_mb=24_564,
            memory_free_mb=20_000,
            utilisation_percent=81.0,
            temperature_c=64.0,
        )
    },
    models=[CHAT, VECTORS],
)


def test_the_inventory_tells_of_each_device_what_is_known_and_null_where_nothing_is() -> None:
    gpu, cpu = inventory(FACTS).devices
    assert (gpu.device_id, gpu.backend, gpu.model, gpu.pending, gpu.pending_max) == ("gpu:0", "cuda", "qwen", 3, 4)
    assert (gpu.memory_total_mb, gpu.memory_used_mb, gpu.memory_free_mb) == (24_564, 4_564, 20_000)
    assert (gpu.utilization_percent, gpu.temperature_c, gpu.tokens_per_s, gpu.restarts) == (81.0, 64.0, 41.5, 1)
    assert (cpu.memory_total_mb, cpu.memory_used_mb, cpu.utilization_percent) == (None, None, None)


def test_the_inventory_tells_which_models_are_in_memory_and_where() -> None:
    """A device that failed has none, whatever it was about to load."""
    qwen, bge = inventory(FACTS).models
    assert (qwen.model_id, qwen.loaded_on, qwen.roles, qwen.embeddings) == (
        "qwen",
        ["gpu:0"],
        ["writer", "planner"],
        False,
    )
    assert (bge.loaded_on, bge.embeddings) == ([], True)


def test_a_node_has_the_roles_of_its_models_and_without_any_the_kinds_of_their_requests() -> None:
    assert roles([CHAT, VECTORS]) == ["planner", "writer"]
    assert roles([changed(CHAT, roles=[]), VECTORS]) == ["chat", "embeddings"]
    assert roles([]) == []


def test_a_heartbeat_tells_how_each_service_is() -> None:
    told = beat(FACTS, 1_000.0)
    assert (told.status.last_seen, told.loaded_models) == (1_000.0, ["qwen"])
    assert (told.metrics.service_count, told.metrics.healthy_service_count) == (4, 2)
    services = {service.service_id: service for service in told.services}
    chat = services["n1/chat/gpu:0"]
    assert [(asset.asset_id, asset.loaded) for asset in chat.assets] == [("qwen", True)]
    assert (chat.state.health, chat.state.load_state, chat.state.availability) == ("healthy", "loaded", "available")
    assert (chat.observed.queue_depth, chat.observed.in_flight, chat.observed.tokens_per_sec) == (1, 2, 41.5)
    assert chat.observed.vram_used_bytes == 4_564 * 1024**2
    failed = services["n1/embeddings/cpu:0"].state
    assert (failed.health, failed.availability, failed.accept_requests) == ("unhealthy", "unavailable", False)


@pytest.mark.parametrize(
    ("pending", "accepting", "availability", "accepts"),
    [(3, True, "available", True), (4, True, "busy", True), (0, False, "unavailable", False)],
)
def test_a_service_is_available_while_its_device_takes_requests(
    pending: int, accepting: bool, availability: str, accepts: bool
) -> None:
    uses = [EngineUse(device="gpu:0", state=EngineState.READY, model="qwen", pending=pending)]
    told = beat(replace(FACTS, uses=uses, accepting=accepting), 0.0).services[0].state
    assert (told.availability, told.accept_requests) == (availability, accepts)


def test_the_registry_understands_what_its_own_node_agent_posts() -> None:
    said = decode(encode(registration(FACTS)), rolemesh.Register)
    assert isinstance(said, rolemesh.Register)
    announced = rolemesh.announcement(said)
    assert (announced.node_id, announced.base_url, announced.roles) == (  # type: ignore[union-attr]
        "n1",
        "http://10.0.0.7:8091",
        ["planner", "writer"],
    )
    told = decode(encode(beat(FACTS, 0.0)), rolemesh.Heartbeat)
    assert isinstance(told, rolemesh.Heartbeat)
    assert rolemesh.devices_of(told) == [
        (
            Gpu(index=0, name="RTX 4090", vram_total_mb=24_564),
            GpuUse(index=0, vram_used_mb=4_564, utilization_percent=81.0),
        )
    ]
    assert rolemesh.heartbeat(told, []).loaded_models == ["qwen"]


def test_an_answer_with_a_status_of_success_is_a_yes_and_any_other_is_explained() -> None:
    assert trouble(HEARTBEAT, 200, "") == ""
    assert trouble(REGISTER, 204, "") == ""
    for status in (401, 403):
        assert "COMPUTEMESH_DISPATCHER_KEY" in trouble(HEARTBEAT, status, "unauthorized")
    assert "redirects" in trouble(HEARTBEAT, 307, "")
    assert "is it a dispatcher?" in trouble(REGISTER, 404, "Not Found")
    assert trouble(HEARTBEAT, 500, "boom") == "it answers /v1/nodes/heartbeat with status 500 (boom)"


@given(
    failures=st.integers(0, 10_000),
    interval_s=st.floats(0.1, 3600),
    chance=st.floats(0, 1),
)
def test_pauses_grow_with_failures_but_never_beyond_the_time_after_which_a_node_is_stale(
    failures: int, interval_s: float, chance: float
) -> None:
    pause = pause_s(failures, interval_s, chance)
    assert 0 < pause <= max(interval_s * 1.1, STALE_S)
    if failures == 0:
        assert pause >= interval_s * 0.9
    assert failures == 0 or pause <= pause_s(failures + 1, interval_s, chance) + 1e-9


@pytest.mark.parametrize(
    "url",
    ["dispatcher:8000", "ftp://dispatcher", "http://", "http://h:port", "http://[x", "https://h/?a=b", "https://h/#a"],
)
def test_what_is_no_address_of_a_dispatcher_is_refused_by_the_name_of_its_setting(url: str) -> None:
    with pytest.raises(ConfigError, match="COMPUTEMESH_DISPATCHER_BASE_URL"):
        checked(url, "COMPUTEMESH_DISPATCHER_BASE_URL")


def test_an_address_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError) as refused:
        checked("https://node:hunter2@dispatcher.example", "COMPUTEMESH_DISPATCHER_BASE_URL")
    assert "hunter2" not in str(refused.value)


def test_an_address_may_have_a_path_and_a_slash_at_its_end() -> None:
    assert checked("https://dispatcher.example/mesh/", "X") == "https://dispatcher.example/mesh"
