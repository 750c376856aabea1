"""An object store in the format that NATS libraries and ``nats object`` read.

    $O.<bucket>.C.<object id>             the parts, in order
    $O.<bucket>.M.<object id in base64>   what they make together; it is there once the object is complete

Whoever writes keeps the order by compare-and-set on the parts' subject, so that two writers of one object cannot mix.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from computemesh.bus.connection import ApiError, Bus, read_ack
from computemesh.bus.errors import BusError
from computemesh.bus.pull import read_all
from computemesh.contracts import storage

_DIGEST: Final = "SHA-256="
_PARTS: Final = "parts"


class Options(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    max_chunk_size: int = 0


class ObjectInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A complete object, in the words of the NATS object store."""

    name: str
    bucket: str
    nuid: str
    """Last token of the subject of its parts: here the name again."""
    size: int
    mtime: str
    chunks: int
    digest: str
    options: Options = Options()
    metadata: dict[str, str] = {}
    """Under ``parts``: where each part stands in the stream, so that any of them can be read at once."""
    deleted: bool = False

    @property
    def sha256(self) -> str:
        """In hexadecimal."""
        return storage.hex_digest(self.digest.removeprefix(_DIGEST))

    @property
    def seqs(self) -> list[int]:
        """Where each part stands."""
        return [int(seq) for seq in self.metadata.get(_PARTS, "").split(",") if seq]


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    subject: str
    seq: int
    data: bytes = b""
    time: datetime | None = None


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    message: _Message | None = None
    error: ApiError | None = None


class ObjectStore:
    """Reads and writes one object store."""

    def __init__(self, bus: Bus, spec: storage.ObjectBucket) -> None:
        self.spec: Final = spec
        self._bus = bus

    async def info(self, object_id: str) -> ObjectInfo | None:
        """The object, if it is there and complete."""
        subject = self.spec.meta_subject(object_id)
        found = await self._read({"last_by_subj": subject})
        if found is None:
            return None
        try:
            info = msgspec.json.decode(found.data, type=ObjectInfo)
        except ValueError as error:
            raise BusError(f"{subject}: no object's description: {error}") from error
        return None if info.deleted else info

    async def part(self, object_id: str, seq: int) -> bytes | None:
        """The part that stands at *seq*; None when it is gone."""
        found = await self._read({"seq": seq})
        return found.data if found is not None and found.subject == self.spec.part_subject(object_id) else None

    async def part_from(self, object_id: str, seq: int) -> tuple[int, bytes] | None:
        """Where the first part at or behind *seq* stands, and what it holds."""
        found = await self._ask_leader({"seq": seq, "next_by_subj": self.spec.part_subject(object_id)})
        return (found.seq, found.data) if found is not None else None

    async def last_part_at(self, object_id: str) -> float | None:
        """When the last part of it was stored, Unix seconds."""
        found = await self._ask_leader({"last_by_subj": self.spec.part_subject(object_id)})
        return found.time.timestamp() if found is not None and found.time is not None else None

    async def append(self, object_id: str, data: bytes, *, last: int) -> int:
        """Stores the next part, and gives where it stands.

        Args:
            last: where the part before it stands; 0 for the first.

        Raises:
            Conflict: another part is there.
            NotStored: the store is full, for example.
        """
        subject = self.spec.part_subject(object_id)
        reply = await self._bus.call(subject, data, headers={"Nats-Expected-Last-Subject-Sequence": str(last)})
        return read_ack(subject, reply.data).seq

    async def complete(self, object_id: str, *, size: int, seqs: list[int], sha256: bytes, part_bytes: int) -> None:
        """Says that the object is whole: from here on it is there.

        Args:
            sha256: the digest itself, 32 bytes.
        """
        info = ObjectInfo(
            name=object_id,
            bucket=self.spec.name,
            nuid=object_id,
            size=size,
            mtime=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            chunks=len(seqs),
            digest=_DIGEST + storage.base64_digest(sha256),
            options=Options(max_chunk_size=part_bytes),
            metadata={_PARTS: ",".join(map(str, seqs))},
        )
        subject = self.spec.meta_subject(object_id)
        reply = await self._bus.call(subject, msgspec.json.encode(info), headers={"Nats-Rollup": "sub"})
        read_ack(subject, reply.data)

    async def remove(self, object_id: str) -> None:
        """Removes an object, or the parts of one that is not complete. First what makes it one."""
        for subject in (self.spec.meta_subject(object_id), self.spec.part_subject(object_id)):
            ask = msgspec.json.encode({"filter": subject})
            await self._bus.call(f"$JS.API.STREAM.PURGE.{self.spec.stream}", ask, timeout_s=30.0)

    async def list(self) -> list[ObjectInfo]:
        """Every complete object, the oldest first."""
        found: list[ObjectInfo] = []
        for stored in await read_all(self._bus, self.spec.stream, self.spec.meta_subjects):
            try:
                info = msgspec.json.decode(stored.data, type=ObjectInfo)
            except ValueError:
                continue
            if not info.deleted:
                found.append(info)
        return found

    async def begun(self) -> dict[str, int]:
        """The ids of all objects of which there are parts, complete or not, with how many parts there are."""
        prefix = self.spec.part_subject("")
        ask = {"subjects_filter": f"{prefix}*", "offset": 0}
        found: dict[str, int] = {}
        while True:
            reply = await self._bus.call(f"$JS.API.STREAM.INFO.{self.spec.stream}", msgspec.json.encode(ask))
            info: dict[str, Any] = msgspec.json.decode(reply.data)
            page: dict[str, int] = info.get("state", {}).get("subjects") or {}
            found |= {subject.removeprefix(prefix): count for subject, count in page.items()}
            ask["offset"] = len(found)
            if not page or len(found) >= info.get("total", 0):
                return found

    async def _read(self, what: dict[str, Any]) -> _Message | None:
        """A message from whichever replica answers; one that does not have it yet is not believed."""
        reply = await self._bus.call(f"$JS.API.DIRECT.GET.{self.spec.stream}", msgspec.json.encode(what))
        headers = reply.headers or {}
        if "Nats-Sequence" in headers:
            return _Message(subject=headers["Nats-Subject"], seq=int(headers["Nats-Sequence"]), data=reply.data)
        return await self._ask_leader(what)

    async def _ask_leader(self, what: dict[str, Any]) -> _Message | None:
        reply = await self._bus.call(f"$JS.API.STREAM.MSG.GET.{self.spec.stream}", msgspec.json.encode(what))
        answer = msgspec.json.decode(reply.data, type=_Answer)
        if answer.error is not None and answer.error.code != 404:
            raise BusError(f"{self.spec.name}: {answer.error.description}")
        return answer.message
