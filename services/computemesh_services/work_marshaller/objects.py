"""Answers for the object store. Any replica does, also one that stands by.

What is known here of an object that is being put is only a copy: the parts themselves say how far it is, and a
compare-and-set on them keeps two who put the same from mixing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from typing import Final, Generic, TypeVar

from computemesh import log
from computemesh.bus import Bus, Conflict, NotStored, ObjectInfo, ObjectStore
from computemesh.contracts import objects, storage
from computemesh.contracts.base import AnyBound, Refused, serve
from computemesh.contracts.objects import (
    OBJECT_BYTES_MAX,
    PART_BYTES,
    ObjectGet,
    ObjectPart,
    ObjectPut,
    ObjectStored,
)
from computemesh.contracts.work import ObjectRef, WorkLogs
from computemesh.logtext import as_text

KNOWN_MAX: Final = 500
"""Objects of which something is remembered, being put and complete each."""

RACES_MAX: Final = 8
"""Races for one part that may be lost."""

V = TypeVar("V")

_log = log.get("objects")


class Upload:
    """How far an object is that is being put."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.known = False
        """What is stored of it was looked up."""
        self.reset()

    def reset(self) -> None:
        self.size = 0
        self.seqs: list[int] = []
        self.digest = hashlib.sha256()

    def add(self, seq: int, data: bytes) -> None:
        self.size += len(data)
        self.seqs.append(seq)
        self.digest.update(data)

    @property
    def last(self) -> int:
        return self.seqs[-1] if self.seqs else 0


class _Newest(OrderedDict[str, V], Generic[V]):
    """Remembers the entries that were used last."""

    def used(self, key: str, value: V) -> V:
        self[key] = value
        self.move_to_end(key)
        while len(self) > KNOWN_MAX:
            self.popitem(last=False)
        return value


class Objects:
    """Puts and gets objects, a part at a time."""

    def __init__(self, bus: Bus) -> None:
        self._store = ObjectStore(bus, storage.OBJECTS)
        self._uploads: _Newest[Upload] = _Newest()
        self._complete: _Newest[ObjectInfo] = _Newest()

    def endpoints(self) -> list[AnyBound]:
        return [serve(objects.PUT, self.on_put), serve(objects.GET, self.on_get)]

    async def on_put(self, part: ObjectPut) -> ObjectStored | Refused:
        """Stores a part, once however often it comes."""
        if info := self._complete.get(part.object_id):
            return _again(info, part)
        upload = self._uploads.used(part.object_id, self._uploads.get(part.object_id) or Upload())
        async with upload.lock:
            if not upload.known:
                if info := await self._store.info(part.object_id):
                    self._uploads.pop(part.object_id, None)
                    return _again(self._complete.used(part.object_id, info), part)
                await self._catch_up(part.object_id, upload)
                upload.known = True
            refusal = await self._take(part, upload)
            if refusal is not None:
                return refusal
            if part.sha256:
                return await self._finish(part, upload)
            return ObjectStored(object_id=part.object_id, size=upload.size)

    async def on_get(self, ask: ObjectGet) -> ObjectPart | Refused:
        info = await self.info(ask.object_id)
        if info is None:
            return _unknown(ask.object_id)
        data = b""
        if ask.offset < info.size:
            number, before = divmod(ask.offset, PART_BYTES)
            part = await self._store.part(ask.object_id, info.seqs[number])
            if part is None:  # It is gone by now, by its age or to make room.
                self._complete.pop(ask.object_id, None)
                return _unknown(ask.object_id)
            data = part[before:]
        return ObjectPart(
            object_id=ask.object_id, offset=ask.offset, data=data, size=info.size, sha256=info.sha256
        )  # fmt: skip

    async def info(self, object_id: str) -> ObjectInfo | None:
        """The object, if it is complete."""
        known = self._complete.get(object_id) or await self._store.info(object_id)
        return self._complete.used(object_id, known) if known else None

    async def refusal(self, ref: ObjectRef) -> Refused | None:
        """Why an object that somebody refers to cannot be used; None: it is there and what they say it is."""
        info = await self.info(ref.object_id)
        if info is None:
            reason = f"there is no object {ref.object_id}, or it is not complete"
        elif (info.size, info.sha256) != (ref.size, ref.sha256 or info.sha256):
            reason = (
                f"object {ref.object_id} has {info.size} bytes and the digest {info.sha256}, not what is said of it"
            )
        else:
            return None
        return Refused(code="no_object", reason=reason, field="payload_object", status=400)

    async def remove(self, object_id: str) -> None:
        """Removes an object that nobody was told of."""
        self._complete.pop(object_id, None)
        await self._store.remove(object_id)

    async def log_part(self, ref: ObjectRef, offset: int, limit: int) -> WorkLogs | None:
        """A part of a log that has ended, without saying whose; None when it is not kept any more."""
        start = max(0, offset - ref.skipped)
        data, size = b"", ref.size
        while len(data) < limit and start + len(data) < size:  # A character may stand in two parts.
            found = await self.on_get(ObjectGet(object_id=ref.object_id, offset=start + len(data)))
            if isinstance(found, Refused):
                return None
            data, size = data + found.data[: limit - len(data)], found.size
        part = as_text(data, rest=max(0, size - start - len(data)), ended=True)
        at = max(offset, ref.skipped)
        return WorkLogs(work_id="", attempt=0, text=part.text, offset=at, next=at + part.used, complete=part.at_end)

    async def _take(self, part: ObjectPut, upload: Upload) -> Refused | None:
        """Stores the part, unless it is stored."""
        end = part.offset + len(part.data)
        if end > OBJECT_BYTES_MAX:
            return Refused(
                code="too_large", reason=f"{end} bytes, an object may have {OBJECT_BYTES_MAX}", field="data", status=413
            )
        if part.offset % PART_BYTES or (len(part.data) != PART_BYTES and not part.sha256):
            return Refused(
                code="bad_part", field="data", status=400,
                reason=f"{len(part.data)} bytes at {part.offset}: each part but the last has {PART_BYTES}",
            )  # fmt: skip
        for _ in range(RACES_MAX):
            if part.offset > upload.size and not await self._catch_up(part.object_id, upload):
                return Refused(
                    code="out_of_order", field="offset", status=409,
                    reason=f"the part at {part.offset} came, and only {upload.size} bytes before it",
                )  # fmt: skip
            if part.offset < upload.size or not part.data:
                return None  # Stored before.
            if part.offset > upload.size:
                continue
            try:
                seq = await self._store.append(part.object_id, part.data, last=upload.last)
            except Conflict:
                if not await self._catch_up(part.object_id, upload):
                    upload.reset()  # What was here was removed by another replica.
                    await self._catch_up(part.object_id, upload)
                continue
            except NotStored as error:
                return Refused(code="not_stored", reason=str(error), status=503, retry="later")
            upload.add(seq, part.data)
            return None
        return Refused(code="not_stored", reason="others put the same object", status=503, retry="later")

    async def _finish(self, part: ObjectPut, upload: Upload) -> ObjectStored | Refused:
        if part.offset + len(part.data) != upload.size:
            return Refused(
                code="out_of_order", field="offset", status=409,
                reason=f"this is said to be the last part, and {upload.size} bytes are there",
            )  # fmt: skip
        if upload.digest.hexdigest() != part.sha256.lower():
            await self._store.remove(part.object_id)
            self._uploads.pop(part.object_id, None)
            return Refused(
                code="bad_digest", field="sha256", status=400,
                reason=f"what arrived has the digest {upload.digest.hexdigest()}; put it again from the start",
            )  # fmt: skip
        try:
            await self._store.complete(
                part.object_id,
                size=upload.size, seqs=upload.seqs, sha256=upload.digest.digest(), part_bytes=PART_BYTES,
            )  # fmt: skip
        except NotStored as error:
            return Refused(code="not_stored", reason=str(error), status=503, retry="later")
        self._uploads.pop(part.object_id, None)
        return ObjectStored(object_id=part.object_id, size=upload.size, complete=True)

    async def _catch_up(self, object_id: str, upload: Upload) -> bool:
        """Reads what others stored of it; True when there was something."""
        before = upload.size
        while found := await self._store.part_from(object_id, upload.last + 1):
            upload.add(*found)
        return upload.size > before


def _again(info: ObjectInfo, part: ObjectPut) -> ObjectStored | Refused:
    """A part of an object that is complete."""
    if part.offset + len(part.data) > info.size or (part.sha256 and part.sha256.lower() != info.sha256):
        reason = f"object {part.object_id} is there, with {info.size} bytes and other contents"
        return Refused(code="exists", reason=reason, field="object_id", status=409)
    return ObjectStored(object_id=part.object_id, size=info.size, complete=True)


def _unknown(object_id: str) -> Refused:
    reason = f"there is no object {object_id}, or it is not complete"
    return Refused(code="not_found", reason=reason, field="object_id", status=404)
