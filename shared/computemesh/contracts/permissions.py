"""Who may say and hear what on the bus, derived from the contracts: accounts, and users within them.

Each role has an account of its own, a subject space that nobody else can reach. What a role may send, ask,
hear or answer crosses into its account by an export and an import, and nothing else does. Within the
account, users have permissions; everything not listed is denied. Only the services' account has JetStream;
everyone else stores by publishing to a captured subject.

Accounts are what makes reply subjects safe. A server checks where a client publishes, not where it wants the
answer: were services and clients in one account, a client could name a record's subject as the reply to a
captured publish, and the server's acknowledgement would overwrite the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from computemesh.contracts.base import Event, Request, Role
from computemesh.contracts.catalog import events, requests
from computemesh.ids import is_token

ACCOUNTS: Final = {
    Role.SERVICES: "MESH",
    Role.NODE: "NODES",
    Role.CLIENT: "CLIENTS",
    Role.OBSERVER: "OBSERVERS",
}
"""The account of each role."""

# Plain clients keep the prefix that every NATS library uses, so that an ordinary program works with nothing
# but NATS_URL.
_INBOXES: Final = {
    Role.SERVICES: "_INBOX_services",
    Role.NODE: "_INBOX_node",
    Role.CLIENT: "_INBOX",
    Role.OBSERVER: "_INBOX_observer",
}

_REPLIES: Final = "_R_"
"""First token of the reply subjects that the server makes for a request from another account. It lets no
client name one."""

_NODE_USER: Final = "node-"
_NODE_ID: Final = "node_id"

_SERVICE_DISCOVERY: Final = tuple(f"$SRV.{verb}{rest}" for verb in ("PING", "INFO", "STATS") for rest in ("", ".>"))
# $JS.FC answers the flow control of ordered consumers, KV watchers among them; without it they stall.
_JETSTREAM: Final = ("$JS.API.>", "$JS.ACK.>", "$JS.FC.>", "$KV.>", "$O.>")


@dataclass(frozen=True)
class Permissions:
    """What one user may do within its account, in the terms of the NATS server."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


@dataclass(frozen=True)
class Crossing:
    """A subject that one account exports and another imports.

    A ``stream`` carries messages out of the exporting account; a ``service`` carries requests into it, and
    their answers back.
    """

    exporter: Role
    importer: Role
    kind: Literal["service", "stream"]
    subject: str
    many_answers: bool = False
    """Whether one request may have more than one answer."""


@dataclass(frozen=True)
class Identity:
    """Whom a user name stands for."""

    role: Role
    node_id: str = ""
    """Which node, when the role is that of nodes."""


def user_name(role: Role, node_id: str = "") -> str:
    """Name of the user of *role*; each node has one of its own."""
    assert bool(node_id) == (role is Role.NODE), f"{role} with node {node_id!r}"
    return f"{_NODE_USER}{node_id}" if node_id else role.value


def identity(user: str) -> Identity | None:
    """Whom the user name *user* stands for; None for a name that is none of ours."""
    if user.startswith(_NODE_USER) and is_token(node_id := user.removeprefix(_NODE_USER)):
        return Identity(Role.NODE, node_id)
    known = user in set(Role) and user != Role.NODE
    return Identity(Role(user)) if known else None


def inbox_prefix(role: Role, node_id: str = "") -> str:
    """The first tokens of the subjects on which a user of *role* receives replies."""
    return f"{_INBOXES[role]}.{node_id}" if node_id else _INBOXES[role]


def is_inbox(subject: str) -> bool:
    """Whether *subject* lies in some role's inbox, or stands for one in another account.

    A server without accounts does not keep callers from naming any reply subject. Services may write
    anywhere in the store, so they must answer only where this holds, or a caller could have a reply written
    for it.
    """
    prefix, dot, rest = subject.partition(".")
    return bool(dot and rest) and (prefix == _REPLIES or prefix in _INBOXES.values())


def permissions(role: Role, node_id: str = "") -> Permissions:
    """What a user of *role* may publish and subscribe to. A node speaks for no other node where a subject names one."""
    inbox = f"{inbox_prefix(role, node_id)}.>"
    publish = {_address(event, role, node_id) for event in events() if role in event.sent_by}
    publish |= {_address(request, role, node_id) for request in requests() if role in request.asked_by}
    subscribe = {event.at("*" if event.target else "") for event in events() if role in event.read_by}
    subscribe |= {_address(request, role, node_id) for request in requests() if request.answered_by is role}
    subscribe.add(inbox)
    match role:
        case Role.SERVICES:
            publish |= {*_JETSTREAM, *_SERVICE_DISCOVERY, f"{_REPLIES}.>", inbox}
            subscribe |= set(_SERVICE_DISCOVERY)
        case Role.NODE:
            # Not by leave to respond: a node could ask its own endpoint, name any reply subject, and then
            # publish there. Its own inbox is for asking its own endpoints.
            publish |= {f"{_REPLIES}.>", inbox}
            subscribe |= set(_SERVICE_DISCOVERY)
        case Role.CLIENT | Role.OBSERVER:
            publish |= set(_SERVICE_DISCOVERY)
    return Permissions(publish=tuple(sorted(publish)), subscribe=tuple(sorted(subscribe)))


def _address(contract: Event[Any] | Request[Any, Any], role: Role, node_id: str) -> str:
    if role is Role.NODE and contract.target == _NODE_ID and node_id:
        return f"{contract.subject}.{node_id}"
    return contract.at("*" if contract.target else "")


def crossings() -> list[Crossing]:
    """Every subject that passes from one account to another, in a fixed order.

    An event goes from its sender's account straight to each reader's: the server does not pass a message
    that came by a service import on to stream imports. For the same reason a reader hears it once, also
    when several roles send it. A captured event goes to the services as a request, whose answer is the
    server's acknowledgement.
    """
    found = {
        Crossing(exporter, importer, "service", subject, many_answers=True)
        for subject in _SERVICE_DISCOVERY
        for exporter, importer in (
            (Role.SERVICES, Role.CLIENT),
            (Role.SERVICES, Role.OBSERVER),
            (Role.NODE, Role.SERVICES),
        )
    }
    for event in events():
        subject = event.at("*" if event.target else "")
        # What no role sends comes from the server, out of the store.
        for sender in event.sent_by or {Role.SERVICES}:
            for reader in event.read_by - {sender}:
                captured = event.captured and reader is Role.SERVICES
                found.add(
                    Crossing(reader, sender, "service", subject)
                    if captured
                    else Crossing(sender, reader, "stream", subject)
                )
    for request in requests():
        subject = request.at("*" if request.target else "")
        for asker in request.asked_by - {request.answered_by}:
            found.add(Crossing(request.answered_by, asker, "service", subject, many_answers=request.many))
    return sorted(found, key=lambda c: (c.exporter, c.kind, c.subject, c.importer))
