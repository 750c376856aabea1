"""What becomes of a node's record: what the simulated mesh does not meet often enough."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from computemesh.config import ConfigError
from computemesh.contracts.base import Refused
from computemesh.contracts.gpus import EndReason, GpuGrant, GpuReservation, GpuReserve
from computemesh.contracts.nodes import NodeRecord, NodeState
from computemesh.hardware import Gpu, GpuUse
from computemesh_services.gpu_orchestrator.config import OrchestratorConfig
from computemesh_services.gpu_orchestrator.ledger import (
    Decided,
    End,
    NoRoom,
    Renew,
    Reserve,
    Tidy,
    Want,
    decide,
    empty,
    owner_gone,
)
from computemesh_services.gpu_orchestrator.room import Facts, facts_of

NOW = 1000.0
NODE = NodeRecord(node_id="n1", session="s1", gpus=[Gpu(index=0, uuid="GPU-0", vram_total_mb=24_000)])
FACTS = facts_of(NODE, revision=5)


def a_wish(rid: str = "g1", mb: int = 10_000, timeout_s: float = 60, **terms: Any) -> Reserve:
    return Reserve(ask=GpuReserve(required_mb=mb, **terms), reservation_id=rid, timeout_s=timeout_s)


def granted(*wishes: Reserve, facts: Facts = FACTS, now: float = NOW) -> Decided:
    decided = decide(empty("n1"), facts, wishes, now)
    assert all(isinstance(answer, GpuReservation) for answer in decided.answers)
    return decided


def test_requests_are_decided_in_the_order_they_came() -> None:
    """Each by what those before it left."""
    decided = decide(empty("n1"), FACTS, [a_wish("a", 15_000), a_wish("b", 10_000), a_wish("c", 9_000)], NOW)
    kinds = [type(answer) for answer in decided.answers]
    assert kinds == [GpuReservation, NoRoom, GpuReservation]
    assert [grant.reservation_id for grant in decided.ledger.grants] == ["a", "c"]


def test_a_decision_that_changes_nothing_gives_the_same_record() -> None:
    """So that nothing is written."""
    ledger = granted(a_wish()).ledger
    wants: list[Want] = [
        a_wish("b", 20_000),
        Renew("x", 10, None),
        End(frozenset("x"), EndReason.RELEASED),
        Tidy(),
        a_wish(),
    ]
    decided = decide(ledger, FACTS, wants, NOW + 1)
    assert decided.ledger is ledger
    assert [type(answer) for answer in decided.answers] == [NoRoom, type(None), type(None), type(None), GpuReservation]


@pytest.mark.parametrize(
    "terms", [{"mb": 9_000}, {"owner": "alice"}, {"gpu_count": 2}, {"node_id": "n2"}, {"work_id": "w1"}]
)
def test_other_terms_under_the_id_of_a_reservation_are_a_conflict(terms: dict[str, Any]) -> None:
    """How long is not among the terms; what stands is left as it is."""
    ledger = granted(a_wish()).ledger
    decided = decide(ledger, FACTS, [a_wish(**terms), a_wish(timeout_s=5)], NOW + 1)
    refused, same = decided.answers
    assert isinstance(refused, Refused)
    assert (refused.code, refused.field) == ("conflict", "reservation_id")
    assert isinstance(same, GpuReservation)
    assert decided.ledger is ledger


def test_a_renewal_counts_from_now_and_keeps_what_it_does_not_name() -> None:
    """Shorter or longer; pids are replaced when named."""
    ledger = granted(a_wish(node_id="n1", pids=[7])).ledger
    longer = decide(ledger, FACTS, [Renew("g1", 500, None)], NOW + 30).ledger.grants[0]
    assert (longer.expires_at, longer.timeout_seconds, longer.pids) == (NOW + 530, 500, [7])
    same = decide(ledger, FACTS, [Renew("g1", None, [8, 9])], NOW + 30).ledger.grants[0]
    assert (same.expires_at, same.timeout_seconds, same.pids) == (NOW + 90, 60, [8, 9])
    assert decide(ledger, FACTS, [Renew("g1", 500, None)], NOW + 60).answers == [None]


def test_the_time_of_a_record_never_goes_back() -> None:
    """A writer whose clock is behind does not bring back what another saw run out, nor grant it longer."""
    ledger = granted(a_wish("a", timeout_s=10), a_wish("b", timeout_s=100)).ledger
    later = decide(ledger, FACTS, [Tidy()], NOW + 20)
    assert [released.reservation_id for released in later.ended] == ["a"]
    behind = decide(later.ledger, FACTS, [a_wish("c", 1_000, timeout_s=10)], NOW - 500)
    assert behind.ledger.changed_at == NOW + 20
    assert behind.ledger.grants[-1].expires_at == NOW + 30


def test_what_others_use_is_noted_at_the_grant_and_forgotten_with_the_last_reservation() -> None:
    """For drivers that do not tell processes; it falls when they use less, and does not grow."""

    def used(mb: int) -> Facts:
        return replace(FACTS, uses=(GpuUse(index=0, uuid="GPU-0", vram_used_mb=mb),), heard_at=NOW)

    first = granted(a_wish("a"), facts=used(3_000)).ledger
    assert first.baselines == {"GPU-0": 3_000}
    second = decide(first, used(8_000), [a_wish("b", 1_000)], NOW).ledger
    assert second.baselines == {"GPU-0": 3_000}
    third = decide(second, used(16_000), [a_wish("c", 500)], NOW).ledger
    assert third.baselines == {"GPU-0": 5_000}
    gone = decide(third, FACTS, [End(frozenset("abc"), EndReason.RELEASED)], NOW)
    assert gone.ledger.baselines == {}
    assert len(gone.ended) == 3


@pytest.mark.parametrize(
    ("node", "revision", "gone"),
    [
        (NODE, 5, False),
        (NODE, 9, False),
        (replace(NODE, state=NodeState.SUSPECT), 9, False),
        (replace(NODE, state=NodeState.LOST), 9, True),
        (replace(NODE, session="s2"), 9, True),
        (None, 9, True),
        (replace(NODE, session="s0"), 5, False),
        (replace(NODE, state=NodeState.LOST), 4, False),
        (None, 5, False),
    ],
)
def test_only_a_later_record_of_the_node_tells_that_its_life_has_ended(
    node: NodeRecord | None, revision: int, *, gone: bool
) -> None:
    """A replica that lags behind the one that granted must not end it."""
    grant: GpuGrant = granted(a_wish(node_id="n1", session="s1")).ledger.grants[0]
    assert owner_gone(grant, node, revision) is gone
    assert not owner_gone(replace(grant, session=""), node, revision)


def test_an_unknown_node_and_another_session_are_refused() -> None:
    """With the field."""
    (gone,) = decide(empty("n1"), None, [a_wish()], NOW).answers
    (stale,) = decide(empty("n1"), FACTS, [a_wish(node_id="n1", session="s0")], NOW).answers
    assert isinstance(gone, Refused)
    assert isinstance(stale, Refused)
    assert (gone.code, stale.code, stale.field) == ("not_found", "wrong_session", "session")


def test_quotas_are_read_from_a_setting() -> None:
    """Owners may have any name; the star stands for those that are not named."""
    quotas = OrchestratorConfig(gpu_quotas=" alice=49152, team a=1=8192 ,*=98304").quotas()
    assert [quotas.limit_mb(owner) for owner in ("alice", "team a=1", "bob", "")] == [49152, 8192, 98304, 98304]
    assert OrchestratorConfig(gpu_quotas="alice=1").quotas().limit_mb("bob") is None


@pytest.mark.parametrize("text", ["alice", "=5", "alice=x", "alice=-1", "alice=1.5", "alice=1,alice=2"])
def test_quotas_that_cannot_be_read_are_refused_by_name(text: str) -> None:
    """At the start, not at the first request."""
    with pytest.raises(ConfigError, match="COMPUTEMESH_GPU_QUOTAS"):
        OrchestratorConfig(gpu_quotas=text).quotas()


def test_a_default_timeout_beyond_the_longest_is_refused() -> None:
    """Else every request without one would be."""
    with pytest.raises(ConfigError, match="GPU_RESERVATION_TIMEOUT"):
        OrchestratorConfig(gpu_reservation_timeout=600, reservation_max_s=300).quotas()
