"""Putting objects into the mesh's store, and getting them out: part after part, with patience.

Over the bus *put* and *get* are ``partial(bus.ask, objects.PUT)`` and ``partial(bus.ask, objects.GET)``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, TypeVar

from computemesh import log
from computemesh.bus import Bus, BusError
from computemesh.contracts import objects
from computemesh.contracts.base import Message, Refused, encode
from computemesh.contracts.objects import PART_BYTES, ObjectGet, ObjectPart, ObjectPut, ObjectStored
from computemesh.contracts.work import ObjectRef, WorkResult
from computemesh.ids import new_id

PATIENCE_S: Final = 20.0
"""How long one part is tried again while nobody answers, or the store is full."""

AGAIN_S: Final = 0.2
AGAIN_S_MAX: Final = 2.0
"""Pause before a part is tried again; doubled while it does not go through."""

BEGUN_AGAIN_MAX: Final = 3
"""Times an object is put from its start again, because what was put of it is gone."""

Put = Callable[[ObjectPut], Awaitable[ObjectStored | Refused]]
Get = Callable[[ObjectGet], Awaitable[ObjectPart | Refused]]
OnProgress = Callable[[int, int], None]
"""Takes the bytes that are through, and all bytes."""

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

_log = log.get("objects")


class ObjectError(Exception):
    """An object that cannot be put or got.

    Args:
        refused: what the mesh says.
    """

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.refused = refused

    @property
    def code(self) -> str:
        return self.refused.code


def put_on(bus: Bus) -> Put:
    """How parts are put over the bus."""
    return lambda part: bus.ask(objects.PUT, part)


def get_on(bus: Bus) -> Get:
    """How parts are got over the bus."""
    return lambda ask: bus.ask(objects.GET, ask)


async def upload(
    put: Put,
    data: bytes | memoryview,
    *,
    object_id: str = "",
    on_progress: OnProgress | None = None,
    patience_s: float | None = PATIENCE_S,
) -> ObjectRef:
    """Puts *data* as an object, and gives the reference to it.

    Args:
        object_id: left out, one is made. The same id and data again do no harm.
        patience_s: None waits for ever.

    Raises:
        ObjectError: it is refused, or the store stayed full.
        BusError: nobody answered.
    """
    whole = memoryview(data)
    digest = hashlib.sha256(whole).hexdigest()
    object_id = object_id or new_id("o")
    for _ in range(BEGUN_AGAIN_MAX):
        try:
            await _put_all(put, whole, digest, object_id, on_progress, patience_s)
        except ObjectError as error:
            # What was stored of it was removed meanwhile, to make room or by a disk that was lost.
            if error.code == "out_of_order":
                continue
            raise
        return ObjectRef(object_id=object_id, size=len(whole), sha256=digest)
    raise ObjectError(
        Refused(code="not_stored", reason="what was put of it did not stay", status=503, retry="later")
    )  # fmt: skip


async def _put_all(
    put: Put, whole: memoryview, digest: str, object_id: str, on_progress: OnProgress | None, patience_s: float | None
) -> None:
    offset = 0
    while True:
        data = bytes(whole[offset : offset + PART_BYTES])
        last = offset + len(data) == len(whole)
        part = ObjectPut(object_id=object_id, offset=offset, data=data, sha256=digest if last else "")
        await _patiently(put, part, patience_s)
        offset += len(data)
        if on_progress is not None:
            on_progress(offset, len(whole))
        if last:
            return


async def parts(
    get: Get, ref: ObjectRef, *, offset: int = 0, patience_s: float | None = PATIENCE_S
) -> AsyncGenerator[bytes]:
    """The object from *offset* on, as it comes in. Its digest is checked with the last part of a whole one.

    Raises:
        ObjectError: it is not there, or it is not what the reference says.
        BusError: nobody answered.
    """
    digest = hashlib.sha256() if offset == 0 else None
    while True:
        part = await _patiently(get, ObjectGet(object_id=ref.object_id, offset=offset), patience_s)
        if part.size != ref.size or (ref.sha256 and part.sha256 != ref.sha256.lower()):
            raise _spoiled(ref, f"{part.size} bytes with the digest {part.sha256}")
        if digest is not None:
            digest.update(part.data)
        offset += len(part.data)
        if offset >= part.size or not part.data:
            break
        yield part.data
    if digest is not None and (offset != part.size or digest.hexdigest() != part.sha256):
        raise _spoiled(ref, f"{offset} bytes with the digest {digest.hexdigest()}")
    if part.data:  # The last is not handed on before all of it is known to be right.
        yield part.data


async def download(
    get: Get, ref: ObjectRef, *, on_progress: OnProgress | None = None, patience_s: float | None = PATIENCE_S
) -> bytes:
    """The whole object, and what it is is checked.

    Raises:
        ObjectError: it is not there, or it is not what the reference says.
        BusError: nobody answered.
    """
    found = bytearray()
    async for data in parts(get, ref, patience_s=patience_s):
        found += data
        if on_progress is not None:
            on_progress(len(found), ref.size)
    return bytes(found)


def result_pieces(answer: WorkResult) -> list[bytes | ObjectRef]:
    """A result as JSON: its pieces, some of which are in the object store."""
    if answer.result_object is not None:
        return [answer.result_object]
    if not answer.result_objects:
        return [encode(answer.result)]
    pieces: list[bytes | ObjectRef] = [b"["]
    for number, (result, kept) in enumerate(zip(answer.result, answer.result_objects, strict=True)):
        pieces += [b"," if number else b"", kept or encode(result)]
    return [*pieces, b"]"]


async def _patiently(ask: Callable[[Q], Awaitable[R | Refused]], question: Q, patience_s: float | None) -> R:
    """The answer, asked for until there is one."""
    loop = asyncio.get_running_loop()
    until_s = None if patience_s is None else loop.time() + patience_s
    pause_s = AGAIN_S
    while True:
        failure: ObjectError | BusError
        try:
            answer = await ask(question)
            if not isinstance(answer, Refused):
                return answer
            failure = ObjectError(answer)
            if answer.retry != "later":
                raise failure
        except BusError as error:
            failure = error
        if until_s is not None and loop.time() + pause_s > until_s:
            raise failure
        _log.info("an object waits", reason=str(failure))
        await asyncio.sleep(pause_s)
        pause_s = min(AGAIN_S_MAX, pause_s * 2)


def _spoiled(ref: ObjectRef, what: str) -> ObjectError:
    reason = f"object {ref.object_id} should have {ref.size} bytes with the digest {ref.sha256}; it has {what}"
    return ObjectError(Refused(code="bad_digest", reason=reason, field="sha256", status=502))
