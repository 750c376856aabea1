"""What a node says of itself over HTTP: its inventory, and what it posts to a dispatcher. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from computemesh.contracts.nodes import EngineCard, EngineState, EngineUse, ModelCard
from computemesh.contracts.rolemesh import (
    BeatMetrics,
    BeatStatus,
    InventoryDevice,
    InventoryHost,
    InventoryModel,
    NodeBeat,
    NodeInventory,
    NodeRegister,
    NodeService,
    ServiceAsset,
    ServiceObserved,
    ServiceStatus,
)
from computemesh_services.node_agent.engines.device import DeviceMetrics

CHAT: Final = "chat"
EMBEDDINGS: Final = "embeddings"

_WORKS: Final = frozenset({EngineState.IDLE, EngineState.STARTING, EngineState.READY, EngineState.DRAINING})
"""States in which an engine takes a request, now or once it has started."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is told from."""

    node_id: str
    session: str
    version: str
    base_url: str
    accepting: bool
    labels: Mapping[str, str]
    host: InventoryHost
    cards: Sequence[EngineCard]
    uses: Sequence[EngineUse]
    metrics: Mapping[str, DeviceMetrics]
    """By device."""
    models: Sequence[ModelCard]


def inventory(facts: Facts) -> NodeInventory:
    """What the node has, and how busy it is."""
    loaded_on = _loaded_on(facts)
    return NodeInventory(
        node_id=facts.node_id,
        session=facts.session,
        version=facts.version,
        base_url=facts.base_url,
        accepting=facts.accepting,
        roles=roles(facts.models),
        host=facts.host,
        devices=devices(facts),
        models=[
            InventoryModel(
                model_id=model.name,
                roles=model.roles,
                loaded_on=loaded_on.get(model.name, []),
                present=model.present,
                size_mb=model.size_mb,
                context_tokens=model.context_tokens,
                embeddings=model.embeddings,
            )
            for model in facts.models
        ],
    )


def devices(facts: Facts) -> list[InventoryDevice]:
    """The devices with their engines, in their order."""
    uses = {use.device: use for use in facts.uses}
    found: list[InventoryDevice] = []
    for card in facts.cards:
        use = uses.get(card.device, EngineUse(device=card.device))
        metrics = facts.metrics.get(card.device, DeviceMetrics())
        total, free = metrics.memory_total_mb, metrics.memory_free_mb
        found.append(
            InventoryDevice(
                device_id=card.device,
                backend=card.backend,
                name=card.name,
                memory_total_mb=total,
                memory_used_mb=max(0, total - free) if total is not None and free is not None else None,
                memory_free_mb=free,
                utilization_percent=metrics.utilisation_percent,
                temperature_c=metrics.temperature_c,
                state=use.state,
                model=use.model,
                slots=card.slots,
                pending=use.pending,
                pending_max=card.pending_max,
                tokens_per_s=use.tokens_per_s,
                restarts=use.restarts,
            )
        )
    return found


def roles(models: Sequence[ModelCard]) -> list[str]:
    """What the node is there for: the roles of its models; where none has one, the kinds of requests they take."""
    named = {role for model in models for role in model.roles}
    return sorted(named or {_kind(model) for model in models})


def registration(facts: Facts) -> NodeRegister:
    """What a dispatcher is told first."""
    found = devices(facts)
    meta: dict[str, Any] = {
        "hostname": facts.host.hostname,
        "software": f"computemesh {facts.version}",
        "models": sorted(model.name for model in facts.models),
        "devices": found,
    }
    return NodeRegister(
        node_id=facts.node_id,
        base_url=facts.base_url,
        roles=roles(facts.models),
        meta=meta,
        session=facts.session,
        host_id=facts.node_id,
        display_name=facts.host.hostname or facts.node_id,
        address=facts.base_url,
        labels=dict(facts.labels),
        resources={
            "cpu_threads": facts.host.cpu_threads,
            "ram_gb": _gib(facts.host.memory_total_mb),
            "gpus": [
                {"gpu_id": device.device_id, "name": device.name, "vram_gb": _gib(device.memory_total_mb)}
                for device in found
                if device.backend != "cpu"
            ],
        },
        services=services(facts),
    )


def beat(facts: Facts, now: float) -> NodeBeat:
    """What a dispatcher is told again and again.

    Args:
        now: Unix seconds.
    """
    told = services(facts)
    return NodeBeat(
        node_id=facts.node_id,
        session=facts.session,
        host_id=facts.node_id,
        status=BeatStatus(last_seen=now),
        metrics=BeatMetrics(
            devices=devices(facts),
            service_count=len(told),
            healthy_service_count=sum(service.state.health == "healthy" for service in told),
            cpu_percent=facts.host.cpu_percent,
            memory_available_mb=facts.host.memory_available_mb,
        ),
        loaded_models=sorted(_loaded_on(facts)),
        services=told,
    )


def services(facts: Facts) -> list[NodeService]:
    """Each kind of requests on each device, with the models that are there for it."""
    by_kind: dict[Literal["chat", "embeddings"], list[ModelCard]] = {}
    for model in facts.models:
        by_kind.setdefault(_kind(model), []).append(model)
    return [
        NodeService(
            service_id=f"{facts.node_id}/{kind}/{device.device_id}",
            host_id=facts.node_id,
            kind=kind,
            endpoint=facts.base_url,
            runtime={"engine": "llama.cpp", "launcher": "managed"},
            assets=[
                ServiceAsset(asset_id=model.name, loaded=device.model == model.name and _serves(device))
                for model in models
            ],
            state=_status(facts, device),
            observed=_observed(device),
        )
        for device in devices(facts)
        for kind, models in by_kind.items()
    ]


def _kind(model: ModelCard) -> Literal["chat", "embeddings"]:
    return EMBEDDINGS if model.embeddings else CHAT


def _serves(device: InventoryDevice) -> bool:
    return device.state in (EngineState.READY, EngineState.DRAINING)


def _loaded_on(facts: Facts) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for use in facts.uses:
        if use.model and use.state in (EngineState.READY, EngineState.DRAINING):
            found.setdefault(use.model, []).append(use.device)
    return found


def _status(facts: Facts, device: InventoryDevice) -> ServiceStatus:
    healthy = device.state in _WORKS
    room = device.pending < device.pending_max
    return ServiceStatus(
        health="healthy" if healthy else "unhealthy",
        load_state="loaded" if _serves(device) else "loading" if device.state is EngineState.STARTING else "unloaded",
        availability="unavailable" if not healthy or not facts.accepting else "available" if room else "busy",
        accept_requests=healthy and facts.accepting,
    )


def _observed(device: InventoryDevice) -> ServiceObserved:
    used_mb = device.memory_used_mb if device.backend != "cpu" else None
    return ServiceObserved(
        tokens_per_sec=device.tokens_per_s,
        queue_depth=max(0, device.pending - device.slots),
        in_flight=min(device.pending, device.slots),
        loaded_model_count=int(_serves(device) and bool(device.model)),
        vram_used_bytes=used_mb * 1024**2 if used_mb is not None else None,
    )


def _gib(mib: int | None) -> float | None:
    return round(mib / 1024, 1) if mib is not None else None
