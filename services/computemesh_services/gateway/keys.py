"""Who may use OpenAI's interface: API keys as the node-registry keeps them, and the tokens of the edge.

The keys are asked for at start, whenever one changes, and every few seconds. While nobody answers, those that are known
go on being known; before any were, nobody comes in without a token.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from starlette.requests import Request

from computemesh import log
from computemesh.bus import Bus, BusError
from computemesh.config import ServiceConfig
from computemesh.contracts import keys
from computemesh.contracts.base import Refused
from computemesh.contracts.keys import KeyRecord, KeysChanged, KeysList
from computemesh.edge import token_needed
from computemesh.lifecycle import Spawn
from computemesh.openai import Question, Usage, prompt_chars
from computemesh_services.gateway.admission import Anyone, Caller, Denied, Permit
from computemesh_services.gateway.limits import Booking, Meter, Over, estimate

LOOK_S: Final = 10.0
"""How often the keys are asked for, whether or not a change was heard of."""

AGAIN_S: Final = 0.5
"""Pause before they are asked for again when nobody answered."""

KNOWN_S: Final = 5.0
"""How long a request waits while the keys are not known yet."""

_log = log.get("keys")


class KeyRing:
    """The keys there are, and what each has spent here. Pure: time is a parameter."""

    def __init__(self) -> None:
        self._records: dict[str, KeyRecord] = {}
        self._meters: dict[str, Meter] = {}

    def __len__(self) -> int:
        return len(self._records)

    def replace(self, records: Iterable[KeyRecord]) -> None:
        """These keys, and no others. One that stays as it is keeps what it has spent."""
        new = {record.digest: record for record in records}
        kept = [digest for digest in self._meters if digest in new and new[digest] == self._records.get(digest)]
        self._meters = {digest: self._meters[digest] for digest in kept}
        self._records = new

    def find(self, shown: str) -> KeyRecord | None:
        """The key that somebody shows."""
        digest = keys.digest(shown)
        record = self._records.get(digest)
        return record if record is not None and hmac.compare_digest(record.digest, digest) else None

    def meter(self, record: KeyRecord, now_s: float) -> Meter:
        """What the key has spent."""
        if record.digest not in self._meters:
            self._meters[record.digest] = Meter(record, now_s)
        return self._meters[record.digest]


class KeyHolder:
    """Somebody with a key."""

    def __init__(self, record: KeyRecord, meter: Meter, clock: Callable[[], float]) -> None:
        self._record = record
        self._meter = meter
        self._clock = clock

    def sees(self, model: str) -> bool:
        return not self._record.models or model in self._record.models

    def admit(self, asked: Question) -> Permit | Denied:
        if not self.sees(asked.model):
            return Denied(model_denied(asked.model))
        now_s = self._clock()
        tokens = estimate(prompt_chars(asked), asked.tokens_max, asked.answers)
        told = self._meter.admit(tokens, now_s)
        headers = self._meter.headers(now_s)
        if isinstance(told, Over):
            refused = Refused(
                code="rate_limit_exceeded",
                reason=told.reason,
                status=429,
                retry="later",
                retry_after_s=told.wait_s,
            )
            return Denied(refused, headers=headers)
        least = tokens if asked.answers > 1 else None
        return KeyPermit(told, self._record.name, headers, self._clock, least=least)


class KeyPermit:
    """A request that is booked on a key.

    Args:
        least: tokens that it costs whatever its engine counted. Engines tell the usage of one of several answers.
    """

    def __init__(
        self,
        booking: Booking,
        key: str,
        headers: Mapping[str, str],
        clock: Callable[[], float],
        *,
        least: int | None = None,
    ) -> None:
        self.key = key
        self.headers = headers
        self._booking = booking
        self._clock = clock
        self._least = least

    def end(self, usage: Usage | None, *, answered: bool) -> None:
        told = usage.prompt_tokens + usage.completion_tokens if usage else None
        if self._least is not None:
            told = max(told or 0, self._least)
        self._booking.end(told if answered else 0, self._clock())


def model_denied(model: str) -> Refused:
    reason = f"this key is not for model {model!r}"
    return Refused(code="model_not_allowed", field="model", reason=reason, status=403)


class Doorkeeper:
    """Lets in who shows a key that is known, or a token of the edge; anybody while there are no keys, where the edge
    itself needs no token."""

    def __init__(self, bus: Bus, config: ServiceConfig) -> None:
        self._bus = bus
        self._tokens = [token.encode() for token in config.entrance().tokens]
        self._token_needed = token_needed(config)
        self._ring = KeyRing()
        self._known = asyncio.Event()
        self._changed = asyncio.Event()
        self._revision = 0

    async def start(self, spawn: Spawn) -> None:
        await self._bus.subscribe(keys.CHANGED, self._on_changed)
        spawn(self._follow())

    @property
    def count(self) -> int:
        """Keys that are known."""
        return len(self._ring)

    async def enter(self, request: Request) -> Caller | Denied:
        """Who asks, or why not to answer."""
        shown = _shown(request)
        fits = [hmac.compare_digest(key.encode(), token) for key in shown for token in self._tokens]
        if any(fits):
            return Anyone()
        if not self._known.is_set():
            try:
                await asyncio.wait_for(self._known.wait(), KNOWN_S)
            except TimeoutError:
                reason = "the API keys are not known yet: the mesh does not answer"
                return Denied(Refused(code="unavailable", reason=reason, status=503, retry="later"))
        if not len(self._ring) and not self._token_needed:
            return Anyone()
        return self._holder(shown)

    def _holder(self, shown: list[str]) -> Caller | Denied:
        if not shown:
            reason = "no API key: send Authorization: Bearer KEY; `computemesh keys create NAME` makes one"
            return Denied(Refused(code="no_token", reason=reason, status=401))
        record = next((found for key in shown if (found := self._ring.find(key)) is not None), None)
        if record is None:
            return Denied(Refused(code="bad_token", reason="that API key is not known here", status=401))
        if record.expires_at is not None and record.expires_at <= time.time():
            reason = f"the API key {record.name!r} has expired"
            return Denied(Refused(code="bad_token", reason=reason, status=401))
        return KeyHolder(record, self._ring.meter(record, time.monotonic()), time.monotonic)

    def learn(self, records: Iterable[KeyRecord]) -> None:
        """These are the keys."""
        self._ring.replace(records)
        self._known.set()

    # --- which keys there are ----------------------------------------------------------------------------------------

    async def _on_changed(self, event: KeysChanged) -> None:
        self._revision = event.revision
        self._changed.set()

    async def _follow(self) -> None:
        while True:
            await self._bus.connected.wait()
            self._changed.clear()
            broke = self._bus.interrupted
            revision, self._revision = self._revision, 0
            try:
                found = await self._every_key(revision)
            except BusError as error:
                found = Refused(code="unavailable", reason=str(error))
            if isinstance(found, Refused):
                _log.warning("cannot learn which API keys there are", reason=found.reason)
                await asyncio.sleep(AGAIN_S)
                continue
            self.learn(found)
            waits = [asyncio.ensure_future(event.wait()) for event in (self._changed, broke)]
            try:
                await asyncio.wait(waits, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    async def _every_key(self, revision: int) -> list[KeyRecord] | Refused:
        """The keys, with what was stored up to a revision at least."""
        found: list[KeyRecord] = []
        ask = KeysList(revision=revision)
        while True:
            page = await self._bus.ask(keys.LIST, ask)
            if isinstance(page, Refused):
                return page
            found += page.keys
            if not page.next:
                return found
            ask = KeysList(revision=revision, after=page.next)


def _shown(request: Request) -> list[str]:
    """The keys that a caller shows."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    found = [bearer.strip()] if scheme.lower() == "bearer" else []
    return [key for key in (*found, request.headers.get("x-api-key", "").strip()) if key]
