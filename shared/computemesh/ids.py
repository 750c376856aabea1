"""Names that travel inside NATS subjects and KV keys.

An id is one token of ``[A-Za-z0-9_-]``, 1 to 63 long. A dot, ``*``, ``>`` or blank in an id would change
the address it becomes part of, so ids are checked where they enter and where a subject is built.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Annotated, Final

import msgspec

ID_PATTERN: Final = r"^[A-Za-z0-9_-]{1,63}$(?!\n)"
_TOKEN: Final = re.compile(ID_PATTERN)

Id = Annotated[
    str,
    msgspec.Meta(pattern=ID_PATTERN, description="One token of letters, digits, `_` and `-`, 1 to 63 long."),
]

ENTITY_PATTERN: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.:@/+-]{0,127}$(?!\n)"

EntityId = Annotated[
    str,
    msgspec.Meta(
        pattern=ENTITY_PATTERN,
        description="1 to 128 of letters, digits and `_-.:@/+`; it begins with a letter, a digit or `_`.",
    ),
]
"""What programs call their engines and peers. It is never part of a subject as it stands."""

Scope = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.:@/+-]{0,127})?$(?!\n)",
        description="As the ids of engines and peers, or empty: the space of those that name none.",
    ),
]
"""A space of names. What is in one is neither seen nor changed from another."""


def is_token(text: str) -> bool:
    """Whether *text* may stand as one token of a subject."""
    return _TOKEN.match(text) is not None


def token_from(text: str) -> str:
    """The nearest token to a free name such as a host name: other characters become ``-``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:63] or "unnamed"


def token_of(name: str) -> str:
    """A token that stands for the id of an engine or a peer, or for a scope, and for no other.

    What is a token already stands for itself. Anything else begins with ``-``, as no such name does: what can be read
    of it, and 128 bits of its digest. The empty scope is ``-``.
    """
    if is_token(name) and not name.startswith("-"):
        return name
    if not name:
        return "-"
    return f"-{re.sub(r'[^A-Za-z0-9_-]', '-', name)[:29]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def new_id(prefix: str) -> str:
    """A fresh id, ``prefix-`` and 64 random bits in hexadecimal."""
    return f"{prefix}-{secrets.token_hex(8)}"
