"""All entities in memory, by scope, with the answers that list them ready to be sent. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from computemesh.contracts.base import encode
from computemesh.contracts.engines import ENGINE, Engine, Engines, EnginesList
from computemesh_services.control_plane import entities, words

NO_ENGINES: Final = b'{"status":"ok","engines":[]}'


class _Scope:
    """The entities of one scope."""

    def __init__(self) -> None:
        self.records: dict[str, Engine] = {}
        """By place: type and id, between which stands what no id can hold."""
        self.ordered: list[str] | None = []
        """The places in their order; None when that is to be found anew."""
        self.infos: dict[str, bytes] = {}
        """Engines as NanoCtrl lists them, encoded."""
        self.listed: bytes | None = NO_ENGINES
        """All of them as one answer; None when that is to be made anew."""
        self.entities: bytes | None = None
        """Entities of all types as NanoCtrl lists them, without what is around the list; None likewise."""

    def order(self) -> list[str]:
        if self.ordered is None:
            self.ordered = sorted(self.records)
        return self.ordered


def _place(entity_type: str, engine_id: str) -> str:
    return f"{entity_type} {engine_id}"


class Roll:
    """Entities as the store has them. What only says that one was heard again costs nothing."""

    def __init__(self) -> None:
        self._scopes: dict[str, _Scope] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        """Scope and place of each key."""

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def scopes(self) -> int:
        return len(self._scopes)

    def take(self, key: str, record: Engine) -> None:
        """The record stands under *key* now."""
        place = _place(record.entity_type, record.engine_id)
        scope = self._scopes.setdefault(record.scope, _Scope())
        before = scope.records.get(place)
        scope.records[place] = record
        self._keys[key] = (record.scope, place)
        if before is None:
            scope.ordered = None
        if before is not None and entities.same(before, record):
            return
        scope.entities = None
        if record.entity_type == ENGINE:
            scope.infos[place] = encode(words.info(record))
            scope.listed = None

    def drop(self, key: str) -> None:
        """Nothing stands under *key* any more."""
        found = self._keys.pop(key, None)
        if found is None:
            return
        name, place = found
        scope = self._scopes[name]
        del scope.records[place]
        scope.ordered = scope.entities = None
        if scope.infos.pop(place, None) is not None:
            scope.listed = None
        if not scope.records:
            del self._scopes[name]

    def listed(self, scope: str) -> bytes:
        """NanoCtrl's answer that lists the engines of a scope, and nothing of any other."""
        found = self._scopes.get(scope)
        if found is None:
            return NO_ENGINES
        if found.listed is None:
            infos = found.infos
            found.listed = b'{"status":"ok","engines":[%b]}' % b",".join(
                infos[place] for place in found.order() if place in infos
            )
        return found.listed

    def entities(self, scope: str) -> bytes:
        """The entities of a scope as NanoCtrl lists them, without what is around the list."""
        found = self._scopes.get(scope)
        if found is None:
            return b""
        if found.entities is None:
            found.entities = encode([words.entity(record) for record in self.matching(scope, None, None)])[1:-1]
        return found.entities

    def matching(self, scope: str, entity_type: str | None, kind: str | None) -> Iterator[Engine]:
        """The entities of a scope, in order, of a type and a kind; None: of any."""
        found = self._scopes.get(scope)
        for place in found.order() if found else ():
            assert found is not None
            record = found.records[place]
            if entity_type in (None, record.entity_type) and kind in (None, record.kind):
                yield record

    def page(self, ask: EnginesList, revision: int, *, bytes_max: int) -> Engines:
        """As many as were asked for and fit, one at least."""
        places: list[str] = []
        records: list[Engine] = []
        for record in self.matching(ask.scope, ask.entity_type, ask.kind):
            places.append(_place(record.entity_type, record.engine_id))
            records.append(record)
        first = bisect_right(places, ask.after) if ask.after else 0
        taken: list[Engine] = []
        size = 0
        for record in records[first : first + ask.limit]:
            size += len(encode(record)) + 1
            if taken and size > bytes_max:
                break
            taken.append(record)
        more = first + len(taken) < len(records)
        return Engines(
            engines=taken, count=len(records), revision=revision, next=places[first + len(taken) - 1] if more else ""
        )
