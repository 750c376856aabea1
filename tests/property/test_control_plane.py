"""The control plane's decisions under any story: what is told, what is listed, who is to be connected to whom.

Method: generated stories on plain records, held against models that are simple enough to be believed.
"""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from computemesh.contracts.engines import Engine, EngineChange, EngineRegister, EnginesList
from computemesh.contracts.peer_records import MemoryEntry, MemoryRecord, TopologyRecord
from computemesh.ids import ENTITY_PATTERN, is_token, token_of
from computemesh_services.control_plane import entities, peers
from computemesh_services.control_plane.roll import Roll

names = st.from_regex(ENTITY_PATTERN.removesuffix("(?!\\n)").strip("^$"), fullmatch=True)
scopes = st.sampled_from(["", "a", "a:b", "a/b"])


def an_engine(scope: str, engine_id: str, now: float, port: int = 1) -> Engine:
    record = entities.registered(
        EngineRegister(scope=scope, engine_id=engine_id, role="decode", host="h", port=port), now
    )
    assert isinstance(record, Engine)
    return record


# --- names ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(names, st.just("")), min_size=2, max_size=2, unique=True))
def test_every_name_has_a_token_of_its_own(two: list[str]) -> None:
    one, other = map(token_of, two)
    assert is_token(one)
    assert is_token(other)
    assert one != other


@given(st.lists(st.tuples(scopes, names, names), min_size=2, max_size=2, unique=True))
def test_every_entity_has_a_key_of_its_own(two: list[tuple[str, str, str]]) -> None:
    one, other = (entities.key_of(*each) for each in two)
    assert one != other
    assert not set(one) & set(".*> ")


# --- what is told --------------------------------------------------------------------------------------------------

Step = tuple[str, str, str]
stories = st.lists(
    st.tuples(
        st.sampled_from(["register", "beat", "gone", "look"]), st.sampled_from(["", "s"]), st.sampled_from("abc")
    ),
    max_size=60,
)


class Ledger:
    """What the acting replica would have told of a story."""

    def __init__(self) -> None:
        self.changes: list[EngineChange] = []
        self.told: dict[str, EngineChange] = {}
        self.latest: dict[str, int] = {}

    def look(self, stored: dict[str, Engine], source: int) -> None:
        """Tells whatever differs from what was told."""
        for key in [*self.told, *(key for key in stored if key not in self.told)]:
            told, record = self.told.get(key), stored.get(key)
            if not entities.told_differs(told, record):
                continue
            scope = record.scope if record else told.scope if told else ""
            change = entities.change(
                told,
                record,
                gone="expired",
                source=source,
                revision=len(self.changes) + 1,
                previous=self.latest.get(scope, 0),
                at=0.0,
            )
            self.changes.append(change)
            self.told[key] = change
            self.latest[scope] = change.revision


def play(story: list[Step]) -> tuple[Ledger, dict[str, Engine]]:
    ledger, stored = Ledger(), dict[str, Engine]()
    for now, (what, scope, name) in enumerate(story):
        key = entities.key_of(scope, "engine", name)
        if what == "register":
            stored[key] = an_engine(scope, name, now)
        elif what == "beat" and key in stored:
            stored[key] = entities.beaten(stored[key], now, 60)
        elif what == "gone":
            stored.pop(key, None)
        elif what == "look":
            ledger.look(stored, now)
    ledger.look(stored, len(story))
    return ledger, stored


@given(stories, st.integers(0, 60))
def test_who_follows_the_changes_ends_with_what_is_stored(story: list[Step], since: int) -> None:
    """From the beginning, or from what a list showed at any revision."""
    ledger, stored = play(story)
    for scope in ("", "s"):
        copy: dict[str, Engine] = {}
        row = [change for change in ledger.changes if change.scope == scope]
        for change in row:
            if change.engine is None:
                del copy[change.engine_id]
            else:
                assert (change.change == "changed") is (change.engine_id in copy)
                copy[change.engine_id] = change.engine
        wanted = {record.engine_id: replace(record, seen_at=0.0) for record in stored.values() if record.scope == scope}
        assert {name: replace(record, seen_at=0.0) for name, record in copy.items()} == wanted
        later = [change for change in row if change.revision > since]
        assert not entities.misses(later, since, ledger.latest.get(scope, 0))


@given(stories, st.data())
def test_a_reader_that_missed_a_change_always_knows(story: list[Step], data: st.DataObject) -> None:
    """Whichever the ledger dropped, which keeps the newest or nothing."""
    ledger, _ = play(story)
    row = [change for change in ledger.changes if not change.scope]
    if not row:
        return
    assert entities.misses([], 0, row[-1].revision)
    if len(row) > 1:
        dropped = data.draw(st.sets(st.sampled_from([change.revision for change in row[:-1]]), min_size=1))
        kept = [change for change in row if change.revision not in dropped]
        assert entities.misses(kept, 0, row[-1].revision)


# --- what is listed ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), scopes, st.sampled_from("abcd"), st.integers(1, 3)), max_size=40),
    st.integers(1, 5),
)
def test_lists_and_pages_show_what_was_taken_and_not_dropped(
    story: list[tuple[bool, str, str, int]], limit: int
) -> None:
    """Of the scope that was asked for, in order, each once, however they were asked for in between."""
    roll, model = Roll(), dict[tuple[str, str], Engine]()
    for now, (take, scope, name, port) in enumerate(story):
        key = entities.key_of(scope, "engine", name)
        if take:
            model[scope, name] = an_engine(scope, name, now, port)
            roll.take(key, model[scope, name])
        else:
            model.pop((scope, name), None)
            roll.drop(key)
        roll.listed(scope)
    assert len(roll) == len(model)
    for scope in ("", "a", "a:b", "a/b"):
        wanted = [record for (of, _), record in sorted(model.items()) if of == scope]
        listed = msgspec.json.decode(roll.listed(scope))["engines"]
        assert [(each["id"], each["port"]) for each in listed] == [(one.engine_id, one.port) for one in wanted]
        found: list[Engine] = []
        after = ""
        for _ in range(40):
            page = roll.page(EnginesList(scope=scope, limit=limit, after=after), 0, bytes_max=10**6)
            found += page.engines
            if not page.next:
                break
            after = page.next
        assert found == wanted


# --- peers ---------------------------------------------------------------------------------------------------------


@given(st.permutations([("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)]))
def test_memory_ends_with_the_newest_epoch_in_whatever_order_it_comes(order: list[tuple[str, int]]) -> None:
    record: MemoryRecord | None = None
    for revision, (name, epoch) in enumerate(order, 1):
        empty = MemoryRecord(alias="p", instance="i", entries={}, revision=revision, at=0.0)
        after = peers.with_memory(record, empty, name, MemoryEntry(length=1, epoch=epoch))
        assert isinstance(after, MemoryRecord)
        record = after
    assert record is not None
    assert {name: entry.epoch for name, entry in record.entries.items()} == {"a": 3, "b": 2}


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.sampled_from("abcd"), unique=True) | st.none(), st.booleans()),
        max_size=30,
    )
)
def test_whom_a_peer_is_to_be_connected_to_is_what_it_and_others_wish_now(story: list[tuple[str, Any, bool]]) -> None:
    """Nothing stays of a wish that was taken back, and every peer for which it makes a difference is named."""
    wishes, model = peers.Wishes(), dict[str, TopologyRecord]()
    for revision, (alias, targets, symmetric) in enumerate(story, 1):
        before = {name: wishes.of("", name).target_peers for name in "abcd"}
        old = wishes.get("", alias)
        new = (
            TopologyRecord(alias=alias, target_peers=targets, symmetric=symmetric, revision=revision, at=0.0)
            if targets is not None
            else None
        )
        wishes.set("", alias, new)
        model.pop(alias, None)
        if new is not None:
            model[alias] = new
        after = {name: wishes.of("", name).target_peers for name in "abcd"}
        assert {name for name in "abcd" if before[name] != after[name]} <= peers.affected(old, new)
    for name in "abcd":
        own = model[name].target_peers if name in model else []
        others = [other for other, spec in sorted(model.items()) if spec.symmetric and name in spec.target_peers]
        assert wishes.of("", name).target_peers == list(dict.fromkeys([*own, *others]))
        assert wishes.of("other", name).target_peers == []
