"""Creates the streams and buckets of :mod:`computemesh.contracts.storage`, and brings them up to date.

Every service of the control plane does this at start. It may run many times at once: creating what exists
with the same configuration is no error, and what differs is updated.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from computemesh import log
from computemesh.bus.connection import Bus, inquire
from computemesh.bus.errors import NotStored
from computemesh.contracts import storage

_NS: Final = 1_000_000_000
_NOT_FOUND: Final = 10059
_log = log.get("provision")


def stream_config(stream: storage.Stream, *, replicas: int) -> dict[str, Any]:
    """The server's configuration of a stream of ours."""
    return {
        "name": stream.name,
        "subjects": sorted(stream.subjects),
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "max_age": int(stream.max_age_s * _NS),
        "max_bytes": stream.max_bytes,
        "max_msg_size": stream.max_message_bytes,
        "duplicate_window": int(stream.duplicate_window_s * _NS),
        "num_replicas": replicas,
        "allow_direct": True,
        "description": stream.about,
    }


def bucket_config(bucket: storage.Bucket[Any], *, replicas: int) -> dict[str, Any]:
    """The server's configuration of the stream behind a bucket of ours."""
    config: dict[str, Any] = {
        "name": bucket.stream,
        "subjects": [bucket.subject(">")],
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "max_msgs_per_subject": 1,
        "max_bytes": bucket.max_bytes,
        "num_replicas": replicas,
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_msg_ttl": True,
        "description": bucket.about,
    }
    if bucket.together:
        config["allow_atomic"] = True
    if bucket.expiry_markers:
        config["subject_delete_marker_ttl"] = 60 * _NS
    if bucket.ledger:
        config |= {"discard": "old", "max_msgs_per_subject": storage.LEDGER_HISTORY}
    if bucket.republish:
        keys = bucket.subject("*.*" if bucket.ledger else "*")
        config["republish"] = {"src": keys, "dest": f"{bucket.republish}.{{{{wildcard(1)}}}}"}
    return config


def object_bucket_config(bucket: storage.ObjectBucket, *, replicas: int) -> dict[str, Any]:
    """The server's configuration of the stream behind an object store of ours."""
    return {
        "name": bucket.stream,
        "subjects": sorted(bucket.subjects),
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "max_age": int(bucket.max_age_s * _NS),
        "max_bytes": bucket.max_bytes,
        "num_replicas": replicas,
        "allow_direct": True,
        "allow_rollup_hdrs": True,
        "description": bucket.about,
    }


def wanted(*, replicas: int) -> list[dict[str, Any]]:
    """The server's configuration of all there is to be."""
    return [
        *(stream_config(stream, replicas=replicas) for stream in storage.STREAMS),
        *(bucket_config(bucket, replicas=replicas) for bucket in storage.BUCKETS),
        *(object_bucket_config(bucket, replicas=replicas) for bucket in storage.OBJECT_BUCKETS),
    ]


async def provision(bus: Bus, *, replicas: int = 1) -> None:
    """Makes every stream, bucket and object store be as declared.

    Args:
        replicas: at least so many copies of each, in a cluster. What has more keeps them: a service that was not told
            must not take away what the others rely on.

    Raises:
        NotStored: the server refuses one, with its reason.
    """
    for config in wanted(replicas=replicas):
        await _ensure(bus, config)


async def drift(bus: Bus, *, replicas: int = 1) -> dict[str, list[str]]:
    """Names of the settings that differ from the declaration, per stream; a missing one is ``["missing"]``."""
    declared = wanted(replicas=replicas)
    found = {config["name"]: _differences(config, await _present(bus, config["name"])) for config in declared}
    return {name: settings for name, settings in found.items() if settings}


async def stream_bounds(bus: Bus, name: str) -> tuple[int, int]:
    """Sequences of the first message that a stream still has, and of the last that was ever stored.

    Raises:
        NotStored: there is no such stream.
    """
    state = (await _api(bus, f"$JS.API.STREAM.INFO.{name}", None))["state"]
    return int(state["first_seq"]), int(state["last_seq"])


async def stream_created_at(bus: Bus, name: str) -> str:
    """When the server made a stream, RFC 3339; a stream made anew has another time."""
    reply = await _api(bus, f"$JS.API.STREAM.INFO.{name}", None)
    return str(reply["created"])


async def _ensure(bus: Bus, config: dict[str, Any]) -> None:
    name = config["name"]
    present = await _present(bus, name)
    if present is None:
        await _api(bus, f"$JS.API.STREAM.CREATE.{name}", config)
        _log.info("created", stream=name)
    elif settings := _differences(config, present):
        copies = max(config["num_replicas"], present["num_replicas"])
        await _api(bus, f"$JS.API.STREAM.UPDATE.{name}", present | config | {"num_replicas": copies})
        _log.info("updated", stream=name, settings=settings)


async def _present(bus: Bus, name: str) -> dict[str, Any] | None:
    try:
        reply = await _api(bus, f"$JS.API.STREAM.INFO.{name}", None)
    except NotStored as error:
        if error.code == _NOT_FOUND:
            return None
        raise
    config: dict[str, Any] = reply["config"]
    return config


def _differences(declared: dict[str, Any], present: dict[str, Any] | None) -> list[str]:
    if present is None:
        return ["missing"]
    return sorted(key for key, value in declared.items() if not _is_met(key, value, present.get(key)))


def _is_met(setting: str, declared: Any, present: Any) -> bool:
    if setting == "num_replicas":
        return bool(present >= declared)
    return bool(_normal(present) == _normal(declared))


def _normal(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


async def _api(bus: Bus, subject: str, body: dict[str, Any] | None) -> dict[str, Any]:
    if body is None:
        reply = await inquire(bus, subject, b"")
    else:
        reply = await bus.call(subject, msgspec.json.encode(body), timeout_s=10.0)
    answer: dict[str, Any] = msgspec.json.decode(reply.data)
    if error := answer.get("error"):
        raise NotStored(f"{subject}: {error.get('description')}", code=error.get("err_code", 0))
    return answer
