"""Objects: payloads, results and logs that are too large for a message.

    anyone  --put-->  work-marshaller   part after part; the last one makes the object complete
    anyone  --get-->  work-marshaller   part after part

They lie in a NATS object store, ``compute-objects``, that only the work-marshaller reads and writes, so that nobody
needs a permission beyond asking. Any of its replicas answers. An object never changes. It goes with its age, or when
room is needed and no item that has not ended needs it.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from computemesh.contracts.base import Message, Refusal, Request, Role
from computemesh.contracts.services import WORK_MARSHALLER
from computemesh.hardware import ByteCount
from computemesh.ids import Id

PART_BYTES: Final = 384 * 1024
"""Bytes in each part of an object but the last: JSON carries them as base64, a third longer."""

OBJECT_BYTES_MAX: Final = 256 * 1024 * 1024
"""Bound on one object."""


class ObjectPut(Message, frozen=True, kw_only=True):
    """One part of an object: 393,216 bytes, in the last perhaps fewer. The same part again does no harm."""

    object_id: Id
    """Chosen by whoever puts it; `computemesh.ids.new_id` makes one that nobody guesses."""
    offset: ByteCount
    """How many bytes come before it. Parts are put in order."""
    data: Annotated[bytes, msgspec.Meta(max_length=PART_BYTES)]
    sha256: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Set with the last part: the digest of the whole object in hexadecimal, which is complete with it."""


class ObjectStored(Message, frozen=True, kw_only=True):
    object_id: Id
    size: ByteCount
    """Bytes so far."""
    complete: bool = False


class ObjectGet(Message, frozen=True, kw_only=True):
    object_id: Id
    offset: ByteCount = 0
    """From this byte on; behind the end, the answer has no data."""


class ObjectPart(Message, frozen=True, kw_only=True):
    object_id: Id
    offset: ByteCount
    data: bytes
    size: ByteCount
    """Bytes of the whole object."""
    sha256: str
    """Of the whole object."""


_ASKERS: Final = frozenset({Role.CLIENT, Role.NODE, Role.SERVICES})
_NOT_FOUND: Final = Refusal(code="not_found", status=404, when="there is no such object, or it is not complete")

PUT: Final = Request(
    subject="compute.objects.put.v1",
    takes=ObjectPut,
    gives=ObjectStored,
    asked_by=_ASKERS,
    service=WORK_MARSHALLER,
    refuses=(
        Refusal(code="too_large", status=413, when="the object is larger than one may be"),
        Refusal(code="out_of_order", status=409, when="the part before this one has not arrived"),
        Refusal(code="bad_part", status=400, when="a part that is not the last has not the bytes that it should have"),
        Refusal(code="exists", status=409, when="an object of that id is there already, with other contents"),
        Refusal(code="bad_digest", status=400, when="what arrived is not what was sent"),
        Refusal(code="not_stored", status=503, when="the object store did not take it"),
    ),
    about="Stores a part of an object.",
)
GET: Final = Request(
    subject="compute.objects.get.v1",
    takes=ObjectGet,
    gives=ObjectPart,
    asked_by=_ASKERS,
    service=WORK_MARSHALLER,
    refuses=(_NOT_FOUND,),
    about="A part of an object.",
)
