"""API keys: who may use the OpenAI interface of the gateways, and how much.

    an operator     --create / revoke-->    node-registry
    anyone          --list-->               node-registry   gateways among them
    node-registry   --changed-->            gateways        "ask for the list again"

A key itself is on the bus and in the store never: only its digest is. It has 256 random bits, so a digest tells
nothing about it, and needs no salt.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated, Final

import msgspec

from computemesh.contracts.base import Event, Message, Refusal, Request, Role
from computemesh.contracts.nodes import Name
from computemesh.contracts.services import NODE_REGISTRY
from computemesh.hardware import Count
from computemesh.ids import Id

KEY_PREFIX: Final = "sk-cm-"
"""What a key begins with, so that programs that look for secrets find it."""

KEYS_MAX: Final = 10_000
PAGE_MAX: Final = 1000

Digest = Annotated[str, msgspec.Meta(max_length=64, description="SHA-256 in hexadecimal, 64 small letters and digits.")]
Limit = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_digest(text: str) -> bool:
    """Whether *text* is what :func:`digest` gives of some key."""
    return len(text) == 64 and not text.strip("0123456789abcdef")


class KeyLimits(Message, frozen=True, kw_only=True):
    """What one key may do. Limits are counted by each gateway for itself; left out (null), there is none."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    """Of prompts and answers together."""
    concurrent: Limit | None = None
    """Requests at the same time."""
    models: Annotated[list[Name], msgspec.Meta(max_length=100)] = []
    """Only these; empty = any."""
    expires_at: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Unix seconds from which on it opens nothing."""


class KeyRecord(KeyLimits, frozen=True, kw_only=True):
    """A key as it is stored."""

    name: Id
    digest: Digest
    created_at: float
    """Unix seconds."""


class KeyCreate(KeyLimits, frozen=True, kw_only=True):
    """Lets in whoever shows the key with this digest."""

    name: Id
    digest: Digest


class KeysList(Message, frozen=True, kw_only=True):
    """Asks for the keys, in the order of their names."""

    revision: Count = 0
    """An answer with what was stored up to this, at least."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=PAGE_MAX)] = PAGE_MAX
    """Keys in one answer, which may be fewer: an answer is at most one message."""
    after: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """`next` of the answer before."""


class KeyList(Message, frozen=True, kw_only=True):
    """Keys, by name."""

    keys: list[KeyRecord]
    count: Count
    """All there are."""
    next: str = ""
    """For `after`, to get those that follow; empty when these are the last."""


class KeyRevoke(Message, frozen=True, kw_only=True):
    name: Id


class KeyRevoked(Message, frozen=True, kw_only=True):
    """The key opens nothing any more, as soon as the gateways have heard of it."""

    name: Id
    left: Count
    """Keys that there are still. Without any, gateways on loopback are open."""


class KeysChanged(Message, frozen=True, kw_only=True):
    """A key was created or revoked."""

    name: Id
    revision: Count
    """Of the store; a list that reflects it is to be asked for."""


CHANGED: Final = Event(
    subject="compute.keys.changed.v1",
    payload=KeysChanged,
    sent_by=frozenset({Role.SERVICES}),
    read_by=frozenset({Role.CLIENT}),
    about="A key was created or revoked. Gateways, which also look by themselves, ask for the list.",
)
CREATE: Final = Request(
    subject="compute.keys.create.v1",
    takes=KeyCreate,
    gives=KeyRecord,
    asked_by=frozenset({Role.SERVICES}),
    service=NODE_REGISTRY,
    refuses=(
        Refusal(code="bad_digest", status=400, when="the digest is none"),
        Refusal(code="exists", status=409, when="there is a key of that name, or the same key under another name"),
        Refusal(code="too_many_keys", status=409, when=f"there are {KEYS_MAX} keys"),
    ),
    about="A new key. Whoever makes it keeps it, and sends its digest.",
)
LIST: Final = Request(
    subject="compute.keys.list.v1",
    takes=KeysList,
    gives=KeyList,
    asked_by=frozenset({Role.CLIENT, Role.SERVICES}),
    service=NODE_REGISTRY,
    about="The keys, without what they are made of.",
)
REVOKE: Final = Request(
    subject="compute.keys.revoke.v1",
    takes=KeyRevoke,
    gives=KeyRevoked,
    asked_by=frozenset({Role.SERVICES}),
    service=NODE_REGISTRY,
    refuses=(Refusal(code="not_found", status=404, when="there is no key of that name"),),
    about="Ends a key. What was begun with it is finished.",
)
