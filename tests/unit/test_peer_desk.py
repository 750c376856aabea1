"""The peer-agent's desk: who is told of what, in whatever order things happen; without I/O."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import MEMORY_KEYS_MAX, Piece, Transfer
from computemesh.peer.signals import PutRegion
from computemesh_services.peer_agent.desk import (
    CloseFar,
    CloseFd,
    Desk,
    Effect,
    Found,
    Name,
    Process,
    TellLost,
    ZeroEpochs,
    memory_of,
)

A, B, FAR = Name("s", "a"), Name("s", "b"), "far"


def process(name: Name) -> Process:
    return Process(name=name, instance=f"i-{name.alias}")


def desk_of(*names: Name) -> Desk:
    desk = Desk()
    for name in names:
        desk.enter(process(name), {})
    return desk


def connected(desk: Desk, link: str, *ends: tuple[Name, str]) -> None:
    """A connection that both of its ends, as far as they are here, know of."""
    for name, peer in ends:
        assert desk.opening(name, peer, link) is None
    for name, _ in ends:
        assert desk.opened(name, link) == []


def put(name: str = "kv", epoch: int = 1, **said: Any) -> PutRegion:
    whole: dict[str, Any] = {"name": name, "length": 8, "epoch": epoch, **said}
    return PutRegion(**whole)


SHARED: dict[str, Any] = {"tokens": {"shm": {"offset": 0}}, "fds": 1}


def test_when_a_process_ends_each_of_its_peers_hears_of_each_connection() -> None:
    """Those of this node are told, those of others through the control plane; the page of epochs is zeroed."""
    desk = desk_of(A, B)
    connected(desk, "l-1", (A, "b"), (B, "a"))
    connected(desk, "l-2", (B, "a"), (A, "b"))
    connected(desk, "l-3", (A, FAR))
    desk.put_epochs(A, 10)
    assert desk.put(A, put(**SHARED), 11, size=8) == []
    assert desk.leave(A, "gone") == [
        ZeroEpochs(10),
        CloseFd(10),
        CloseFd(11),
        TellLost(B, "a", "l-1", "gone"),
        TellLost(B, "a", "l-2", "gone"),
        CloseFar(FAR, "l-3", "gone"),
    ]
    assert desk.leave(B, "gone") == []
    assert len(desk) == desk.links() == desk.regions() == 0


def test_a_process_that_says_hello_again_ends_no_connection() -> None:
    """Its descriptors come anew, and its memory is fresh."""
    desk = desk_of(A, B)
    connected(desk, "l-1", (A, "b"), (B, "a"))
    desk.put_epochs(A, 10)
    desk.put(A, put(**SHARED), 11, size=8)
    assert desk.forget(A) == [CloseFd(10), CloseFd(11)]
    desk.enter(process(A), {"l-1": "b"})
    assert desk.close(B, "a", "l-1", "enough") == (True, [TellLost(A, "b", "l-1", "enough")])


def test_who_does_not_know_of_a_connection_yet_hears_of_its_end_after_that() -> None:
    """The peer on another node may end it before the answer has come."""
    desk = desk_of(A)
    assert desk.opening(A, FAR, "l-1") is None
    assert desk.closed_by_peer(A, FAR, "l-1", "enough") == (True, [])
    refused = desk.resolve(A, FAR, "l-1", ["kv"], same_host=False)
    assert isinstance(refused, Refused)
    assert refused.code == "no_link"
    assert desk.opened(A, "l-1") == [TellLost(A, FAR, "l-1", "enough")]
    assert desk.links() == 0


def test_a_connection_is_between_two_and_nobody_else_can_use_or_end_it() -> None:
    """By its name alone it cannot be had."""
    desk = desk_of(A, B, Name("s", "c"), Name("other", "a"))
    connected(desk, "l-1", (A, "b"), (B, "a"))
    for owner, asker, link in ((A, "c", "l-1"), (Name("other", "a"), "b", "l-1"), (A, "b", "l-2")):
        refused = desk.resolve(owner, asker, link, ["kv"], same_host=True)
        assert isinstance(refused, Refused)
        assert refused.code == "no_link"
    assert desk.close(Name("s", "c"), "a", "l-1", "") == (False, [])
    assert desk.close(A, "c", "l-1", "") == (False, [])
    assert desk.closed_by_peer(A, "c", "l-1", "") == (False, [])
    assert desk.closed_by_peer(Name("s", "nobody"), "b", "l-1", "") == (False, [])
    desk.enter(process(Name("s", "liar")), {"l-1": "b"})
    assert desk.close(Name("s", "liar"), "b", "l-1", "") == (True, []), "b has it with another one"
    again = desk.opening(A, "c", "l-1")
    assert again is not None
    assert again.code == "bad_message"
    assert isinstance(desk.resolve(A, "b", "l-1", ["kv"], same_host=True), Found)


def test_what_is_shared_goes_to_processes_of_this_node_only() -> None:
    """Others get what the other transports need; the page of epochs comes once, first, and for reading."""
    desk = desk_of(A, B)
    connected(desk, "l-1", (A, "b"), (B, "a"))
    connected(desk, "l-2", (A, FAR))
    desk.put_epochs(A, 10)
    tokens = {"shm": {"offset": 0}, "tcp": {"x": 1}}
    desk.put(A, put("w", tokens=tokens, fds=1), 11, size=8)
    desk.put(A, put("r", tokens=tokens, fds=1, writable=False), 12, size=8)
    here = desk.resolve(A, "b", "l-1", ["r", "none", "w", "r"], same_host=True)
    assert isinstance(here, Found)
    assert (here.names, here.fds) == (["", "r", "w"], [(10, False), (12, False), (11, True)])
    assert [(one.name, one.writable, sorted(one.tokens)) for one in here.regions] == [
        ("r", False, ["shm", "tcp"]),
        ("w", True, ["shm", "tcp"]),
    ]
    far = desk.resolve(A, FAR, "l-2", ["r", "w"], same_host=False)
    assert isinstance(far, Found)
    assert (far.names, far.fds, [sorted(one.tokens) for one in far.regions]) == ([], [], [["tcp"], ["tcp"]])


def test_memory_under_a_name_is_replaced_by_what_is_newer_only() -> None:
    """The descriptor of what it was is closed; a drop that comes late drops nothing."""
    desk = desk_of(A)
    desk.put_epochs(A, 10)
    assert desk.put_epochs(A, 20) == [CloseFd(10)]
    first, second = put(epoch=1, **SHARED), put(epoch=2)
    assert desk.put(A, first, 11, size=8) == desk.taken(A, first) == []
    assert desk.put(A, second, -1, size=0) == []
    assert desk.taken(A, second) == [CloseFd(11)]
    assert desk.taken(A, second) == desk.taken(A, first) == desk.refused(A, first) == []
    refused = desk.put(A, put(epoch=1), -1, size=0)
    assert isinstance(refused, Refused)
    assert refused.code == "stale_epoch"
    assert desk.put(A, put(epoch=2), -1, size=0) == [], "said twice"
    assert desk.drop(A, "kv", 1) == (False, [])
    assert desk.drop(A, "kv", 2) == (True, [])
    assert desk.drop(A, "kv", 2) == (False, [])


def test_memory_that_the_control_plane_refuses_leaves_the_one_before_it() -> None:
    """The process still has that one; of several that were not known yet, the one that was taken last stays."""
    desk = desk_of(A)
    desk.put_epochs(A, 10)
    first, second, third = put(epoch=1, **SHARED), put(epoch=2, **SHARED), put(epoch=3, **SHARED)
    assert desk.put(A, first, 11, size=8) == []
    assert desk.refused(A, first) == [CloseFd(11)]
    assert desk.regions() == 0
    desk.put(A, first, 12, size=8)
    desk.taken(A, first)
    assert desk.put(A, second, 13, size=8) == []
    assert desk.put(A, third, 14, size=8) == [CloseFd(13)]
    assert desk.refused(A, second) == desk.taken(A, second) == [], "it is not offered any more"
    assert desk.refused(A, third) == [CloseFd(14)]
    here = desk.get(A)
    assert here is not None
    assert (here.offers["kv"].put, here.offers["kv"].fd) == (first, 12)
    desk.put(A, second, 15, size=8)
    assert desk.leave(A, "gone") == [ZeroEpochs(10), CloseFd(10), CloseFd(15), CloseFd(12)]
    assert desk.taken(A, second) == desk.refused(A, second) == []


def test_a_process_offers_no_more_than_is_kept_of_it() -> None:
    """One that it has already it may offer again."""
    desk = desk_of(A)
    for number in range(MEMORY_KEYS_MAX):
        assert desk.put(A, put(f"r{number}"), -1, size=0) == []
    refused = desk.put(A, put("one more"), -1, size=0)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.field) == ("full", "ask.name")
    assert desk.put(A, put("r0", epoch=2), -1, size=0) == []


def test_what_the_control_plane_is_told_of_memory() -> None:
    """The key that verbs know is told when it is one."""
    desk = desk_of(A)
    desk.put(A, put(tokens={"rdma": {"rkey": 7}, "tcp": {}}, address=4096), -1, size=0)
    desk.put(A, put("odd", tokens={"rdma": {"rkey": "x"}}), -1, size=0)
    here = desk.get(A)
    assert here is not None
    told = memory_of(here, "kv")
    assert told is not None
    assert (told.scope, told.alias, told.instance, told.addr, told.rkey) == ("s", "a", "i-a", 4096, 7)
    assert told.transports == ["rdma", "tcp"]
    odd = memory_of(here, "odd")
    assert odd is not None
    assert odd.rkey == 0
    assert memory_of(here, "none") is None
    assert [(beat.scope, beat.alias, beat.instance) for beat in desk.beats()] == [("s", "a", "i-a")]


@pytest.mark.parametrize(
    ("piece", "code", "field"),
    [
        (Piece(local="none", length=1), "no_region", "pieces[1].local"),
        (Piece(local="kv", local_offset=1, length=8), "out_of_range", "pieces[1].local_offset"),
        (Piece(local="kv", local_offset=2**63 - 1, length=2**63 - 1), "out_of_range", "pieces[1].local_offset"),
    ],
)
def test_a_transfer_is_looked_at_piece_by_piece(piece: Piece, code: str, field: str) -> None:
    """The refusal names the piece."""
    desk = desk_of(A)
    desk.put(A, put(), -1, size=0)
    whole = Piece(local="kv", length=8)
    good = Transfer(transfer_id="t", scope="s", alias="a", peer="b", kind="read", pieces=[whole])
    assert desk.may_move(good) is None
    refused = desk.may_move(
        Transfer(transfer_id="t", scope="s", alias="a", peer="b", kind="read", pieces=[whole, piece])
    )
    assert refused is not None
    assert (refused.code, refused.field) == (code, field)
    gone = desk.may_move(Transfer(transfer_id="t", scope="x", alias="a", peer="b", kind="read", pieces=[whole]))
    assert gone is not None
    assert gone.code == "not_found"


class Histories(RuleBasedStateMachine):
    """Processes of this node and one of another one connect, end connections and end, in any order.

    Held against a plain account: each descriptor is closed once, and a process that lives is told once of the end of
    each of its connections, unless it ended it itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.fds = 100
        self.open_fds: set[int] = set()
        self.links = 0
        self.ends: dict[tuple[Name, str], str] = {}
        """Connections that a process knows of, with the peer."""
        self.opening: dict[str, list[tuple[Name, str]]] = {}
        self.far: set[str] = set()
        """Connections that the process on the other node knows of."""

    NAMES = st.sampled_from([Name("s", alias) for alias in "abc"])

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case CloseFd(fd):
                    self.open_fds.remove(fd)
                case TellLost(to, peer, link):
                    assert self.ends.pop((to, link)) == peer, "told of a connection it does not know"
                case CloseFar(peer, link):
                    assert peer == FAR
                    self.far.remove(link)
                case ZeroEpochs(fd):
                    assert fd in self.open_fds

    def here(self, name: Name) -> bool:
        return self.desk.get(name) is not None

    @rule(name=NAMES)
    def enter(self, name: Name) -> None:
        if not self.here(name):
            self.desk.enter(process(name), {})

    @rule(name=NAMES)
    def leave(self, name: Name) -> None:
        if self.here(name):
            for key in [key for key in self.ends if key[0] == name]:
                del self.ends[key]
            self.do(self.desk.leave(name, "gone"))

    @rule(name=NAMES, region=st.sampled_from("xy"))
    def put(self, name: Name, region: str) -> None:
        if not self.here(name):
            return
        for epochs in (True, False):
            self.fds += 1
            self.open_fds.add(self.fds)
            if epochs:
                self.do(self.desk.put_epochs(name, self.fds))
            else:
                effects = self.desk.put(name, put(region, epoch=self.fds, **SHARED), self.fds, size=8)
                assert not isinstance(effects, Refused)
                self.do(effects)

    @rule(name=NAMES, region=st.sampled_from("xy"))
    def drop(self, name: Name, region: str) -> None:
        here = self.desk.get(name)
        if here is not None and region in here.offers:
            found, effects = self.desk.drop(name, region, here.offers[region].put.epoch)
            assert found
            self.do(effects)

    @rule(name=NAMES, region=st.sampled_from("xy"), taken=st.booleans())
    def settle(self, name: Name, region: str, taken: bool) -> None:
        here = self.desk.get(name)
        if here is not None and region in here.offers and not here.offers[region].taken:
            said = here.offers[region].put
            self.do(self.desk.taken(name, said) if taken else self.desk.refused(name, said))

    @rule(name=NAMES, peer=st.sampled_from(["a", "b", "c", FAR]))
    def connect(self, name: Name, peer: str) -> None:
        if not self.here(name) or peer == name.alias or (peer != FAR and not self.here(Name("s", peer))):
            return
        self.links += 1
        link = f"l-{self.links}"
        ends = [(name, peer)] if peer == FAR else [(name, peer), (Name("s", peer), name.alias)]
        for end, other in ends:
            assert self.desk.opening(end, other, link) is None
        if peer == FAR:
            self.far.add(link)
        self.opening[link] = ends

    @precondition(lambda self: self.opening)
    @rule(data=st.data())
    def opened(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from(sorted(self.opening)))
        end, other = self.opening[link].pop()
        if not self.opening[link]:
            del self.opening[link]
        here = self.desk.get(end)
        if here is not None and link in here.links:
            self.ends[end, link] = other
        self.do(self.desk.opened(end, link))

    @precondition(lambda self: self.ends)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        end, link = data.draw(st.sampled_from(sorted(self.ends)))
        peer = self.ends.pop((end, link))
        found, effects = self.desk.close(end, peer, link, "enough")
        assert found
        self.do(effects)

    @precondition(lambda self: self.far)
    @rule(data=st.data())
    def far_closes(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from(sorted(self.far)))
        self.far.remove(link)
        for alias in "abc":
            _, effects = self.desk.closed_by_peer(Name("s", alias), FAR, link, "enough")
            self.do(effects)

    @invariant()
    def every_end_is_told_and_no_descriptor_lost(self) -> None:
        kept = {one.epochs_fd for one in self.desk if one.epochs_fd >= 0}
        kept |= {
            end.fd
            for one in self.desk
            for offer in one.offers.values()
            for end in offer.close()
            if isinstance(end, CloseFd)
        }
        assert kept == self.open_fds
        for (end, link), peer in self.ends.items():
            here = self.desk.get(end)
            assert here is not None
            assert here.links[link].peer == peer
            if peer == FAR:
                assert link in self.far, f"{end} was not told that {link} has ended"
            else:
                other = self.desk.get(Name("s", peer))
                assert other is not None, f"{end} was not told that {peer} has ended"
                assert link in other.links, f"{end} was not told that {link} has ended"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
