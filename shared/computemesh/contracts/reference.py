"""The reference pages, written from the contracts: who says what to whom, and what is kept where.

``make docs`` writes them to ``docs/reference``; a test fails when they are stale.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from computemesh.contracts import storage
from computemesh.contracts.base import Event, Refused, Request, Role, ServiceCard
from computemesh.contracts.catalog import CONVERSATIONS, events, requests, routes
from computemesh.contracts.openapi import document, subject
from computemesh.contracts.permissions import (
    ACCOUNTS,
    crossings,
    inbox_prefix,
    permissions,
    user_name,
)
from computemesh.contracts.schemas import schemas_of
from computemesh.contracts.services import SERVICES

NOTE: Final = "<!-- Written by `make docs` from shared/computemesh/contracts; edit there. -->\n\n"
NODE_ID: Final = "<node_id>"

_ACCOUNTS_SAY: Final = f"""\
Each role has an account of its own on the NATS server; in that of nodes, each node is a user. `{NODE_ID}` stands for a
node's id. Everything that is not listed is denied."""

_CROSSINGS_SAY: Final = """\
A stream carries messages out of the exporting account; a service carries requests into it, and answers back."""


def pages() -> dict[str, str]:
    """Every reference page: file name and contents."""
    return {
        "services.md": processes(),
        "subjects.md": subjects(),
        "storage.md": kept(),
        "permissions.md": granted(),
        "schemas.json": schemas(),
        **{f"openapi/{card.name}.json": _json(document(card, _answered_by(card), routes(card))) for card in SERVICES},
    }


def _answered_by(card: ServiceCard) -> list[Request[Any, Any]]:
    return [request for request in requests() if request.service is card]


def processes() -> str:
    """Every service, with its doors."""
    about = (
        "Each is a process of its own. At its port, on loopback unless it is told otherwise, it has `/docs`,\n"
        "`/openapi.json`, `/healthz`, `/readyz`, `/metrics` and the routes below. On the bus it answers all its\n"
        "requests, with its name as queue group.\n"
    )
    parts = [f"{NOTE}# Services\n\n{about}"]
    for card in SERVICES:
        everything = (*storage.STREAMS, *storage.BUCKETS, *storage.OBJECT_BUCKETS)
        owned = [_code(one.name) for one in everything if one.owner == card.name]
        parts.append(
            f"\n## {card.name}\n\n{card.about}\n\nPort {card.port}. Role `{card.role}`."
            + (f" Owns {', '.join(owned)}." if owned else "")
            + f" [OpenAPI document](openapi/{card.name}.json).\n"
        )
        rows = [_door_row(request) for request in _answered_by(card)]
        rows += [("", f"`{route.http.method} {route.http.path}`", route.about) for route in routes(card)]
        parts.append(_table(("request", "HTTP", "what"), rows))
    return "".join(parts)


def _door_row(request: Request[Any, Any]) -> tuple[str, ...]:
    routes = "<br>".join(f"`{route.method} {route.path}`" for route in request.http)
    return (_code(subject(request)), routes, request.about)


def subjects() -> str:
    """Every subject, by conversation."""
    parts = [f"{NOTE}# Subjects\n\nPayloads are JSON; [schemas.json](schemas.json) has their JSON Schemas.\n"]
    for module in CONVERSATIONS:
        parts.append(
            f"\n## {module.__name__.rsplit('.', 1)[1]}\n\n```\n{inspect.cleandoc(module.__doc__ or '')}\n```\n"
        )
        mine = list(vars(module).values())
        facts = [event for event in events() if any(event is value for value in mine)]
        asks = [request for request in requests() if any(request is value for value in mine)]
        parts.append(_table(("event", "payload", "sent by", "captured", "what"), [_event_row(e) for e in facts]))
        parts.append(_table(("request", "takes", "gives", "HTTP", "what"), [_request_row(r) for r in asks]))
    return "".join(parts)


def _event_row(event: Event[Any]) -> tuple[str, ...]:
    sent_by = ", ".join(sorted(event.sent_by)) or "the server"
    return (_code(subject(event)), event.payload.__name__, sent_by, "yes" if event.captured else "", event.about)


def _request_row(request: Request[Any, Any]) -> tuple[str, ...]:
    routes = "<br>".join(f"`{route.method} {route.path}`" for route in request.http)
    gives = f"{request.gives.__name__}, in parts" if request.many else request.gives.__name__
    return (_code(subject(request)), request.takes.__name__, gives, routes, request.about)


def kept() -> str:
    """Every stream, bucket and object store."""
    streams = [
        (
            _code(stream.name),
            "<br>".join(map(_code, stream.subjects)),
            stream.owner,
            _limits(stream),
            stream.about,
        )
        for stream in storage.STREAMS
    ]
    buckets = [
        (
            _code(bucket.name),
            bucket.value.__name__,
            bucket.owner,
            f"{bucket.max_bytes // storage.MIB} MiB",
            _code(f"{bucket.republish}.<key>") if bucket.republish else "",
            bucket.about,
        )
        for bucket in storage.BUCKETS
    ]
    stores = [
        (_code(store.name), store.owner, f"{store.max_bytes // storage.MIB} MiB, {_days(store)}", store.about)
        for store in storage.OBJECT_BUCKETS
    ]
    return (
        f"{NOTE}# Streams, buckets and object stores\n\n"
        + _table(("stream", "subjects", "owner", "limits", "what"), streams)
        + _table(("bucket", "value", "written by", "limit", "republished to", "what"), buckets)
        + _table(("object store", "read and written by", "limits", "what"), stores)
    )


def _limits(stream: storage.Stream) -> str:
    size = stream.max_bytes // storage.MIB
    return f"{size} MiB, {_days(stream)}, {stream.max_message_bytes // 1024} KiB a message"


def _days(kept: storage.Stream | storage.ObjectBucket) -> str:
    return f"{kept.max_age_s / storage.DAY_S:g} days"


def granted() -> str:
    """Every account, what passes between them, and what their users may publish and hear."""
    parts = [f"{NOTE}# Permissions\n\n{_ACCOUNTS_SAY}\n"]
    for role in Role:
        node_id = NODE_ID if role is Role.NODE else ""
        allowed = permissions(role, node_id)
        user, inbox = user_name(role, node_id), inbox_prefix(role, node_id)
        store = " It alone has JetStream." if role is Role.SERVICES else ""
        account = f"Account `{ACCOUNTS[role]}`, user `{user}`, inbox prefix `{inbox}`.{store}"
        parts.append(f"\n## {role.value}\n\n{account}\n")
        for verb, listed in (("May publish", allowed.publish), ("May subscribe", allowed.subscribe)):
            parts.append(f"\n{verb}:\n\n" + "".join(f"- `{subject}`\n" for subject in sorted(listed)))
    parts.append(f"\n## Exports and imports\n\n{_CROSSINGS_SAY}\n")
    parts.append(_table(("account", "exports", "subject", "imported by"), _export_rows()))
    return "".join(parts)


def _export_rows() -> list[tuple[str, ...]]:
    importers: dict[tuple[str, str, str], list[str]] = {}
    for crossing in crossings():
        exported = (ACCOUNTS[crossing.exporter], crossing.kind, _code(crossing.subject))
        importers.setdefault(exported, []).append(ACCOUNTS[crossing.importer])
    return [(*exported, ", ".join(accounts)) for exported, accounts in importers.items()]


def schemas() -> str:
    """JSON Schemas of every payload, by name, and which subject carries which."""
    kinds: list[type[Any]] = [Refused]
    carried: dict[str, Any] = {}
    for event in events():
        kinds.append(event.payload)
        carried[subject(event)] = {"event": event.payload.__name__}
    for request in requests():
        kinds += [request.takes, request.gives]
        carried[subject(request)] = {"takes": request.takes.__name__, "gives": request.gives.__name__}
    found = schemas_of(list(dict.fromkeys(kinds)), "#/$defs/{name}")
    return _json(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "subjects": carried, "$defs": found}, "sorted"
    )


def _json(document: dict[str, Any], order: Literal["sorted"] | None = None) -> str:
    return msgspec.json.format(msgspec.json.encode(document, order=order), indent=2).decode() + "\n"


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
