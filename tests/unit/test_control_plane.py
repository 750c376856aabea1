"""What the control plane decides about records: engines, changes, peers, memory and topology, without a server."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from computemesh.contracts.base import Refused, encode
from computemesh.contracts.engines import ENGINE, Engine, EngineChange, EngineRegister, EnginesList
from computemesh.contracts.peer_records import MemoryEntry, MemoryRecord, PeerRecord, TopologyRecord
from computemesh.contracts.peers import MEMORY_KEYS_MAX, PeerRegister, TopologyPut
from computemesh.ids import token_of
from computemesh_services.control_plane import entities, peers
from computemesh_services.control_plane.newest import Newest
from computemesh_services.control_plane.roll import NO_ENGINES, Roll

NOW = 1000.0


def an_engine(engine_id: str = "e1", **said: Any) -> Engine:
    facts: dict[str, Any] = {"role": "prefill", "host": "h", "port": 1, **said}
    record = entities.registered(EngineRegister(engine_id=engine_id, **facts), NOW)
    assert isinstance(record, Engine)
    return record


def a_change(record: Engine | None, told: EngineChange | None = None, **more: Any) -> EngineChange:
    given: dict[str, Any] = {"gone": "removed", "source": 1, "revision": 1, "previous": 0, "at": NOW, **more}
    return entities.change(told, record, **given)


def a_peer(**said: Any) -> PeerRecord:
    record = peers.registered(None, PeerRegister(alias="a", instance="i1"), "i1", NOW, 7)
    assert isinstance(record, PeerRecord)
    return replace(record, **said)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A-b_9", "x" * 63, "_"])
def test_a_name_that_is_a_token_stands_for_itself(name: str) -> None:
    """So that people find it in the store."""
    assert token_of(name) == name


def test_scopes_and_ids_with_separators_do_not_collide() -> None:
    """Scope `a` with id `b:c` and scope `a:b` with id `c` are two records, as are all that could be read alike."""
    pairs = [
        ("a", "b:c"),
        ("a:b", "c"),
        ("", "a:b:c"),
        ("a/b", "c"),
        ("a", "b/c"),
        ("a.b", "c"),
        ("a-b", "c"),
        ("-", "c"),
    ]
    keys = {entities.key_of(scope, kind, name) for scope, name in pairs for kind in (ENGINE, "a", "a/engine")}
    assert len(keys) == 3 * len(pairs)


def test_a_key_is_one_token_that_holds_no_wildcard() -> None:
    """A scope of `*` would else stand for those of everybody."""
    key = entities.key_of("*", ">", "a.b c")
    assert not set(key) & set(".*> ")


# --- engines -------------------------------------------------------------------------------------------------------


def test_a_registration_makes_the_record() -> None:
    record = an_engine(metadata={"a": 1})
    assert (record.kind, record.zmq_address, record.seen_at, record.registered_at) == ("prefill", "tcp://h:1", NOW, NOW)


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [
        ("10.0.0.2", 6, "tcp://10.0.0.2:6"),
        ("::1", 6, "tcp://[::1]:6"),
        ("[::1]", 6, "tcp://[::1]:6"),
        ("", 6, ""),
        ("10.0.0.2", 0, ""),
    ],
)
def test_the_socket_of_an_engine_is_its_host_and_port(host: str, port: int, address: str) -> None:
    assert entities.zmq_address(host, port) == address


def test_an_engine_without_a_role_and_an_entity_without_a_kind_are_refused_by_field() -> None:
    for said, field in (
        (EngineRegister(engine_id="a"), "role"),
        (EngineRegister(engine_id="a", entity_type="s"), "kind"),
    ):
        answer = entities.registered(said, NOW)
        assert isinstance(answer, Refused)
        assert (answer.code, answer.field) == ("bad_engine", field)


def test_an_entity_that_says_too_much_is_refused_with_the_numbers() -> None:
    """What it says is listed to everybody who asks."""
    answer = entities.registered(EngineRegister(engine_id="a", role="decode", metadata="x" * 70_000), NOW)
    assert isinstance(answer, Refused)
    assert (answer.code, answer.status) == ("too_large", 413)
    assert "65536" in answer.reason


def test_a_heartbeat_is_stored_once_in_ten_seconds_and_always_after_a_clock_was_ahead() -> None:
    """Else a record written by a fast clock would expire although its engine lives."""
    record = an_engine()
    assert entities.beaten(record, NOW + 9.9, 60) is record
    assert entities.beaten(record, NOW + 10.0, 60).seen_at == NOW + 10.0
    assert entities.beaten(record, NOW - 0.1, 60).seen_at == NOW - 0.1


def test_a_heartbeat_is_no_change_but_a_registration_always_is() -> None:
    """An engine that registers again has lost its KV cache, whatever it says."""
    record = an_engine()
    told = a_change(record)
    assert not entities.told_differs(told, replace(record, seen_at=NOW + 30))
    assert entities.told_differs(told, replace(record, registered_at=NOW + 30))
    assert entities.told_differs(told, None)
    assert not entities.told_differs(None, None)
    assert entities.told_differs(None, record)
    assert not entities.told_differs(a_change(None, told), None)


def test_what_happened_is_told_by_its_name() -> None:
    record = an_engine(scope="s")
    added = a_change(record)
    assert (added.change, added.scope, added.engine) == ("added", "s", record)
    assert a_change(replace(record, port=2), added).change == "changed"
    gone = a_change(None, added, gone="expired")
    assert (gone.change, gone.engine_id, gone.engine) == ("expired", "e1", None)
    assert a_change(record, gone).change == "added"


def test_a_gap_between_changes_is_a_miss_and_a_row_without_one_is_not() -> None:
    """The first change must follow on what the asker knows, each other one on the one before."""
    row = [a_change(an_engine(), revision=revision, previous=previous) for revision, previous in ((5, 2), (9, 5))]
    assert not entities.misses(row, 2, 9)
    assert not entities.misses(row, 4, 9)
    assert entities.misses(row, 1, 9)
    assert entities.misses([row[0], replace(row[1], previous=7)], 2, 9)
    assert entities.misses([], 3, 9)
    assert not entities.misses([], 9, 9)


# --- the roll ------------------------------------------------------------------------------------------------------


def listed(roll: Roll, scope: str = "") -> list[str]:
    return [engine["id"] for engine in msgspec.json.decode(roll.listed(scope))["engines"]]


def a_roll(*records: Engine) -> Roll:
    roll = Roll()
    for record in records:
        roll.take(entities.key(record), record)
    return roll


def test_a_list_holds_the_engines_of_one_scope_in_order_and_nothing_else() -> None:
    service = entities.registered(EngineRegister(engine_id="a", entity_type="service", kind="x"), NOW)
    assert isinstance(service, Engine)
    roll = a_roll(an_engine("b"), an_engine("a"), an_engine("c", scope="s"), service)
    assert (listed(roll), listed(roll, "s"), roll.listed("other")) == (["a", "b"], ["c"], NO_ENGINES)
    assert [record.entity_type for record in roll.matching("", None, None)] == ["engine", "engine", "service"]
    assert [record.engine_id for record in roll.matching("", None, "prefill")] == ["a", "b"]


def test_a_list_is_made_once_until_something_in_it_changes() -> None:
    """A heartbeat is not in it; a new port is, and so is who went."""
    record = an_engine("a")
    roll = a_roll(record, an_engine("b"))
    before, entities_before = roll.listed(""), roll.entities("")
    roll.take(entities.key(record), replace(record, seen_at=NOW + 1))
    assert roll.listed("") is before
    assert roll.entities("") is entities_before
    roll.take(entities.key(record), replace(record, port=2))
    assert roll.listed("") != before
    assert roll.entities("") != entities_before
    roll.drop(entities.key(record))
    assert listed(roll) == ["b"]
    assert [one["id"] for one in msgspec.json.decode(b"[%b]" % roll.entities(""))] == ["b"]
    roll.drop(entities.key(record))
    assert (len(roll), roll.scopes) == (1, 1)
    roll.drop(entities.key(an_engine("b")))
    assert (len(roll), roll.scopes, roll.listed(""), roll.entities("")) == (0, 0, NO_ENGINES, b"")


@pytest.mark.parametrize("bytes_max", [1, 1200, 10**6])
def test_pages_taken_together_have_each_entity_once(bytes_max: int) -> None:
    """However few fit; an answer holds one at least."""
    roll = a_roll(*(an_engine(f"e{number}") for number in range(25)))
    found: list[str] = []
    after = ""
    for _ in range(25):
        page = roll.page(EnginesList(limit=10, after=after), 3, bytes_max=bytes_max)
        assert (page.count, page.revision) == (25, 3)
        found += [record.engine_id for record in page.engines]
        if not page.next:
            break
        after = page.next
    assert found == sorted(f"e{number}" for number in range(25))


# --- peers ---------------------------------------------------------------------------------------------------------


def test_an_alias_belongs_to_the_instance_that_has_it() -> None:
    """Another one is refused; the same may register again, and is changed only when it says something new."""
    mine = a_peer()
    said = PeerRegister(alias="a", instance="i1")
    assert peers.registered(mine, said, "i1", NOW + 5, 9) == replace(mine, seen_at=NOW + 5)
    moved = peers.registered(mine, replace(said, device="mlx5_0"), "i1", NOW + 5, 9)
    assert isinstance(moved, PeerRecord)
    assert (moved.revision, moved.registered_at) == (9, NOW)
    other = peers.registered(mine, said, "i2", NOW, 9)
    assert isinstance(other, Refused)
    assert (other.code, other.status, other.field) == ("alias_taken", 409, "alias")
    assert other.reason == "Peer agent alias 'a' already exists in this scope"


def test_two_that_cannot_show_who_they_are_are_two() -> None:
    """NanoCtrl's clients have no instance, so nothing says that it is the same process."""
    assert isinstance(
        peers.registered(a_peer(instance=None), PeerRegister(alias="a", instance="i"), None, NOW, 9), Refused
    )


def test_a_cleanup_by_who_was_refused_the_alias_is_known_for_a_minute() -> None:
    """DLSlime's agent cleans up after itself also when it was refused; it must not clean up another."""
    record = a_peer(instance=None)
    assert not peers.cleanup_is_anothers(record, NOW)
    record = peers.refused(record, NOW)
    assert peers.cleanup_is_anothers(record, NOW + 59)
    assert not peers.cleanup_is_anothers(record, NOW + 60)
    assert not peers.cleanup_is_anothers(peers.refused(record, 0.0), NOW)


def test_what_a_registration_stored_itself_is_told_from_what_another_did() -> None:
    """When its acknowledgement is lost it finds the record, which would be somebody else's alias otherwise."""
    record = peers.registered(None, PeerRegister(alias="a", instance="i"), None, NOW, 9)
    assert isinstance(record, PeerRecord)
    assert peers.made(record, NOW, 9)
    assert not peers.made(record, NOW, 10)
    assert not peers.made(record, NOW + 1, 9)
    assert not peers.made(None, NOW, 9)


def test_a_peer_that_says_too_much_is_refused() -> None:
    said = PeerRegister(alias="a", instance="i1", resource={"x": "y" * 600_000})
    answer = peers.registered(None, said, "i1", NOW, 1)
    assert isinstance(answer, Refused)
    assert answer.field == "resource"


def test_revisions_rise_also_when_the_clock_does_not() -> None:
    assert peers.revision_after(0, 1.5) == 1_500_000
    assert peers.revision_after(9_000_000, 1.5) == 9_000_001


def test_a_peers_heartbeat_is_stored_once_in_ten_seconds() -> None:
    record = a_peer()
    assert entities.beaten(record, NOW + 9.5, 60) is record
    assert entities.beaten(record, NOW + 10.5, 60).seen_at == NOW + 10.5
    assert entities.beaten(record, NOW - 5, 60).seen_at == NOW - 5


def test_aliases_that_are_found_count_in_hexadecimal() -> None:
    assert [peers.automatic("agent", number) for number in (1, 10, 255)] == ["agent-1", "agent-a", "agent-ff"]


# --- memory --------------------------------------------------------------------------------------------------------

EMPTY = MemoryRecord(alias="a", instance="i1", entries={}, revision=1, at=NOW)


def with_kv(
    record: MemoryRecord | None, epoch: int, instance: str = "i1", revision: int = 2, since: float = 0.0
) -> MemoryRecord:
    empty = replace(EMPTY, instance=instance, revision=revision)
    entry = MemoryEntry(length=8, epoch=epoch)
    after = peers.with_memory(record, empty, "kv", entry, over=record, since=since)
    assert isinstance(after, MemoryRecord)
    return after


def test_memory_that_is_registered_again_replaces_what_was_there_unless_it_is_late() -> None:
    record = with_kv(None, 2)
    assert with_kv(record, 2, revision=3) is record
    assert with_kv(record, 1, revision=3) is record
    assert with_kv(record, 3, revision=3).entries["kv"].epoch == 3


def test_memory_of_an_earlier_life_does_not_count() -> None:
    """Neither when it is asked for, nor as a part of what the next life offers."""
    record = with_kv(None, 9)
    assert peers.offered(record, "i2") == {}
    assert with_kv(record, 1, "i2").entries["kv"].epoch == 1
    assert peers.view(a_peer(instance="i2"), record).memory_keys == []
    assert peers.view(a_peer(), record).memory_keys == ["kv"]


def test_memory_of_another_life_is_replaced_only_where_that_is_known_to_be_over() -> None:
    """A replica that knows the peer's record of a moment ago must not let its last life overwrite the next."""
    record, empty = with_kv(None, 9, "i2"), replace(EMPTY, instance="i1")
    answer = peers.with_memory(record, empty, "kv", MemoryEntry(length=8, epoch=1))
    assert isinstance(answer, Refused)
    assert (answer.code, answer.field) == ("not_yours", "instance")
    assert isinstance(peers.with_memory(record, empty, "kv", MemoryEntry(length=8), over=record), MemoryRecord)


def test_memory_that_was_offered_before_the_peer_registered_again_is_written_again() -> None:
    """What is left of a peer that expired may be dropped at this moment; a newer revision keeps it."""
    record = with_kv(None, 2)
    assert with_kv(record, 2, revision=3, since=NOW) is record
    assert with_kv(record, 2, revision=3, since=NOW + 1).revision == 3


def test_dropping_memory_leaves_what_was_registered_since() -> None:
    record = with_kv(None, 2)
    assert peers.without_memory(record, "kv", 1, NOW, 3) is record
    assert peers.without_memory(record, "other", 9, NOW, 3) is record
    after = peers.without_memory(record, "kv", 2, NOW, 3)
    assert (after.entries, after.revision) == ({}, 3)


def test_a_peer_offers_no_more_memory_than_is_kept() -> None:
    entry = MemoryEntry(length=1)
    full = replace(EMPTY, entries={str(number): entry for number in range(MEMORY_KEYS_MAX)})
    for name, fits in (("new", False), ("0", True)):
        answer = peers.with_memory(full, EMPTY, name, replace(entry, epoch=1))
        assert isinstance(answer, MemoryRecord) is fits


def test_few_pieces_of_memory_always_fit() -> None:
    """So they need not be counted out each time: the longest name of the widest letters, and the largest numbers."""
    entry = MemoryEntry(length=2**63 - 1, epoch=2**63 - 1, addr=2**63 - 1, rkey=2**32 - 1, lkey=2**32 - 1)
    widest = encode({"\U0001f9e0" * 200: replace(entry, transports=["rdma", "shm", "tcp"])})
    assert len(widest) < peers.ENTRY_BYTES_MAX


# --- the newest revisions ------------------------------------------------------------------------------------------


def test_the_newest_revision_of_a_scope_never_falls_also_when_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("computemesh_services.control_plane.newest.SCOPES_MAX", 2)
    newest = Newest()
    assert newest.of("a") == 0
    assert [newest.note("a", 3), newest.note("a", 2), newest.note("b", 4)] == [True, False, True]
    newest.note("c", 9)
    assert [newest.of("a"), newest.of("b"), newest.of("c"), newest.of("other")] == [3, 4, 9, 3]
    newest.note("b", 5)
    newest.note("d", 6)
    assert [newest.of("b"), newest.of("c"), newest.of("other")] == [5, 9, 9], "what changed last is remembered"


# --- topology ------------------------------------------------------------------------------------------------------


def a_wish(alias: str, *targets: str, symmetric: bool = False, revision: int = 5) -> TopologyRecord:
    said = TopologyPut(alias=alias, target_peers=list(targets), symmetric=symmetric)
    return peers.wished(None, said, NOW, revision)


def test_a_topology_names_each_target_once_and_never_the_peer_itself() -> None:
    assert a_wish("a", "b", "a", "c", "b").target_peers == ["b", "c"]


def test_the_same_wish_again_is_no_change() -> None:
    said = TopologyPut(alias="a", target_peers=["b"])
    record = a_wish("a", "b")
    assert peers.wished(record, said, NOW + 9, 6) == record
    assert peers.wished(record, replace(said, symmetric=True), NOW + 9, 6).revision == 6


def test_a_symmetric_wish_reaches_its_targets_and_ends_with_the_peer() -> None:
    """What a target is told otherwise stays."""
    wishes = peers.Wishes()
    wishes.set("", "b", a_wish("b", "x", revision=1))
    wishes.set("", "a", a_wish("a", "b", "c", symmetric=True, revision=8))
    assert (wishes.of("", "b").target_peers, wishes.of("", "b").revision) == (["x", "a"], 8)
    assert wishes.of("", "c").target_peers == ["a"]
    assert wishes.of("other", "c").target_peers == []
    wishes.set("", "a", a_wish("a", "c", symmetric=True))
    assert wishes.of("", "b").target_peers == ["x"]
    wishes.set("", "a", None)
    assert (wishes.of("", "c").target_peers, wishes.of("", "c").revision) == ([], 0)


def test_whom_a_wish_concerns() -> None:
    """Those that it named both ways before, too: they are to let go."""
    plain, both = a_wish("a", "b"), a_wish("a", "c", symmetric=True)
    assert peers.affected(None, plain) == {"a"}
    assert peers.affected(plain, both) == {"a", "c"}
    assert peers.affected(both, None) == {"a", "c"}
    assert peers.affected(both, both) == set()


# --- what is left over ----------------------------------------------------------------------------------------------


def test_what_is_kept_of_peers_that_are_gone_goes_after_a_while() -> None:
    """Memory after the time a peer has, a topology after an hour; of those that are there, nothing."""
    here, memory, wish = {"here": a_peer()}, with_kv(None, 1), a_wish("a", "b")
    kept = [("here", memory), ("gone", memory)]
    wishes = [("here", wish), ("gone", wish)]

    def left(after_s: float) -> list[tuple[str, str]]:
        return list(peers.left_over(here, kept, wishes, NOW + after_s, 60))

    assert left(60) == []
    assert left(61) == [("memory", "gone")]
    assert left(3601) == [("memory", "gone"), ("topology", "gone")]
    other = {"here": a_peer(instance="i2")}
    assert list(peers.left_over(other, kept, [], NOW + 61, 60)) == [("memory", "here"), ("memory", "gone")]
