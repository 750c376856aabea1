"""RoleMesh's node agents at our door: what they post becomes announcements and heartbeats of ours. Pure.

Such a node hosts engines that are reached by HTTP under its ``base_url``, for the ``roles`` it names. It
runs no work items, so it has no slots and nothing is ever placed on it.

What else a registration (``meta``) or a heartbeat (its devices) holds is not fixed anywhere: it is read where
it can be, and ignored where not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec

from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import Name, NodeAnnouncement, NodeHeartbeat, NodeRecord
from computemesh.hardware import Gpu, GpuUse
from computemesh.ids import Id

LABELS_MAX: Final = 64
TEXT_MAX: Final = 200
DEVICES_MAX: Final = 256
MB_MAX: Final = 2**40


class Register(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/nodes/register``. Unknown fields are ignored, in tests too: the protocol is not ours."""

    node_id: Id
    base_url: Annotated[str, msgspec.Meta(max_length=500)]
    roles: Annotated[list[Name], msgspec.Meta(max_length=1000)] = []
    meta: dict[str, Any] | None = None
    session: Any = None
    """Told by our own node agent alone."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /v1/nodes/heartbeat``. Where the devices stand in it is looked for."""

    node_id: Id
    metrics: Any = None
    devices: Any = None
    gpus: Any = None
    loaded_models: Any = None
    session: Any = None


def on_the_bus(record: NodeRecord | None, session: Any) -> bool:
    """Whether a node that posts here is one of ours, known by what it says on the bus. That counts; what it posts
    changes nothing.

    Args:
        session: what it posted as that.
    """
    return record is not None and record.session != "" and bool(session)


def announcement(said: Register) -> NodeAnnouncement | Refused:
    """The announcement that a registration amounts to."""
    try:
        url = urlsplit(said.base_url)
        host = url.hostname or ""
    except ValueError:
        url, host = urlsplit(""), ""
    if url.scheme not in ("http", "https") or not host or len(host) > 253:
        reason = f"{said.base_url!r} is not the http or https address of a node"
        return Refused(code="bad_message", field="base_url", reason=reason)
    meta = said.meta or {}
    return NodeAnnouncement(
        node_id=said.node_id,
        hostname=host,
        slots=0,
        base_url=said.base_url,
        roles=said.roles,
        labels=_labels(meta),
        gpus=[gpu for gpu, _ in devices(meta)],
    )


def reannouncement(record: NodeRecord, found: Sequence[tuple[Gpu, GpuUse]]) -> NodeAnnouncement | None:
    """What a heartbeat tells of the GPUs that the record does not have; None when it tells nothing new."""
    gpus = [gpu for gpu, _ in found]
    if not gpus or not record.base_url or gpus == record.gpus:
        return None
    facts: dict[str, Any] = {name: getattr(record, name) for name in NodeAnnouncement.__struct_fields__}
    facts |= {"gpus": gpus, "tier": None}
    return NodeAnnouncement(**facts)


def heartbeat(said: Heartbeat, found: Sequence[tuple[Gpu, GpuUse]]) -> NodeHeartbeat:
    """The heartbeat of ours."""
    models = _list(said.loaded_models)
    return NodeHeartbeat(
        node_id=said.node_id,
        loaded_models=[model for model in models if isinstance(model, str) and 0 < len(model) <= TEXT_MAX],
        gpus=[use for _, use in found],
    )


def _labels(meta: Mapping[str, Any]) -> dict[str, str]:
    """What in *meta* is short enough to be a label."""
    found = {
        name: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in meta.items()
        if isinstance(value, str | int | float) and 0 < len(name) <= TEXT_MAX
    }
    short = [(name, text) for name, text in found.items() if len(text) <= TEXT_MAX]
    return dict(short[:LABELS_MAX])


# --- devices -----------------------------------------------------------------------------------------------------


def devices_of(said: Heartbeat) -> list[tuple[Gpu, GpuUse]]:
    """The GPUs in a heartbeat, and what is in use of them."""
    return devices({"devices": said.devices, "gpus": said.gpus, "metrics": said.metrics})


def devices(said: Mapping[str, Any]) -> list[tuple[Gpu, GpuUse]]:
    """The GPUs in a list or an object called ``devices``, ``gpus`` or ``metrics``, at most one level further down."""
    for name in ("devices", "gpus", "metrics"):
        if found := list(_read(said.get(name))):
            return found[:DEVICES_MAX]
    metrics = said.get("metrics")
    return devices({**_object(metrics), "metrics": None}) if metrics else []


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]


def _read(listed: Any) -> Iterator[tuple[Gpu, GpuUse]]:
    """Devices as a list, or as an object by their ids."""
    each = [("", _object(item)) for item in _list(listed)]
    each += [(str(key), _object(item)) for key, item in _object(listed).items()]
    for place, (key, device) in enumerate(each):
        name = next((str(device[k]) for k in ("device_id", "id", "device", "ref") if k in device), key)
        total_mb = _size(device, "total")
        if total_mb is None or name.lower().startswith("cpu"):
            continue
        used_mb, free_mb = _size(device, "used"), _size(device, "free")
        if used_mb is None:
            used_mb = max(0, total_mb - free_mb) if free_mb is not None else 0
        index = _index(device.get("index"), name, place)
        percent = _number(next((device[k] for k in _UTILIZATION if k in device), None))
        utilization = percent if percent is not None and percent <= 100 else None
        shown = device.get("name")
        text = shown[:TEXT_MAX] if isinstance(shown, str) else ""
        yield (
            Gpu(index=index, name=text, vram_total_mb=total_mb),
            GpuUse(index=index, vram_used_mb=min(used_mb, total_mb), utilization_percent=utilization),
        )


_UTILIZATION: Final = ("utilization_percent", "gpu_utilization", "utilization_gpu", "util_percent", "utilization")
_UNITS: Final = {"mb": 1.0, "mib": 1.0, "bytes": 1 / 1024**2, "gb": 1024.0, "gib": 1024.0}
_DIGITS: Final = re.compile(r"(\d{1,4})$")


def _size(device: Mapping[str, Any], what: str) -> int | None:
    """How much memory is *what* (total, used, free) in MiB, whatever it is called; None when it is not told."""
    for key, value in device.items():
        words = str(key).lower().split("_")
        if what not in words or words[-1] not in _UNITS or not {"vram", "memory", "mem"} & set(words):
            continue
        number = _number(value)
        if number is not None and number * _UNITS[words[-1]] <= MB_MAX:
            return round(number * _UNITS[words[-1]])
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)


def _index(told: Any, name: str, place: int) -> int:
    if isinstance(told, int) and not isinstance(told, bool) and 0 <= told < 10_000:
        return told
    found = _DIGITS.search(name)
    return int(found[1]) if found else place
