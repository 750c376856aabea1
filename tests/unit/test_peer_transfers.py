"""Transfers that are ordered over the bus: begun once, ended once, bounded; without I/O."""

from __future__ import annotations

from typing import Any

from computemesh.contracts.peers import Piece, Transfer, TransferBegun, Transferred
from computemesh_services.peer_agent import transfers
from computemesh_services.peer_agent.desk import Name
from computemesh_services.peer_agent.transfers import GRACE_S, Transfers

A = Name("s", "a")


def transfer(transfer_id: str, **said: Any) -> Transfer:
    whole: dict[str, Any] = {
        "transfer_id": transfer_id,
        "scope": "s",
        "alias": "a",
        "peer": "b",
        "kind": "read",
        "pieces": [Piece(local="kv", length=4)],
        "timeout_s": 10.0,
    }
    whole.update(said)
    return Transfer(**whole)


def outcome(transfer_id: str, *, ok: bool = True) -> Transferred:
    return Transferred(
        transfer_id=transfer_id, node_id="said", scope="said", alias="said", peer="b", kind="read", ok=ok, at=5.0
    )


def ask(book: Transfers, wanted: Transfer, now: float) -> str:
    """Where it stands, `new` when it runs from now on, or the code of the refusal."""
    answer = book.known(wanted) or book.begin(wanted, now)
    return "new" if answer is None else answer.state if isinstance(answer, TransferBegun) else answer.code


def test_an_id_is_begun_once_and_stands_for_its_terms_for_good() -> None:
    """Also after its end."""
    book = Transfers(10, "n1")
    assert ask(book, transfer("t"), 0.0) == "new"
    assert ask(book, transfer("t"), 1.0) == "running"
    assert ask(book, transfer("t", peer="c"), 1.0) == "conflict"
    assert book.end(A, outcome("t")) is not None
    assert ask(book, transfer("t"), 2.0) == "completed"
    assert ask(book, transfer("t", peer="c"), 2.0) == "conflict"
    assert book.running == 0


def test_an_end_is_told_once_by_its_process_and_in_its_name() -> None:
    """What another process says of it counts for nothing; what the process says of itself does not either."""
    book = Transfers(10, "n1")
    book.begin(transfer("t"), 0.0)
    assert book.end(Name("s", "b"), outcome("t")) is None
    assert book.end(Name("x", "a"), outcome("t")) is None
    told = book.end(A, outcome("t", ok=False))
    assert told is not None
    assert (told.node_id, told.scope, told.alias, told.ok, told.at) == ("n1", "s", "a", False, 5.0)
    assert book.end(A, outcome("t")) is None
    assert ask(book, transfer("t"), 1.0) == "failed"


def test_what_an_earlier_life_began_is_told_by_this_one() -> None:
    """Once."""
    book = Transfers(10, "n1")
    assert book.end(A, outcome("old")) is not None
    assert book.end(A, outcome("old")) is None


def test_no_more_run_than_may() -> None:
    """One that ended, or was not begun after all, makes room."""
    book = Transfers(2, "n1")
    assert [ask(book, transfer(f"t{number}"), 0.0) for number in range(3)] == [
        "new",
        "new",
        "too_many_requests",
    ]
    book.forget("t0")
    assert ask(book, transfer("t2"), 0.0) == "new"
    assert book.end(A, outcome("t1")) is not None
    assert ask(book, transfer("t0"), 0.0) == "new"


def test_what_is_not_ended_in_its_time_or_with_its_process_fails() -> None:
    """Each with its reason, and once."""
    book = Transfers(10, "n1")
    book.begin(transfer("soon", timeout_s=1.0), 100.0)
    book.begin(transfer("later", timeout_s=50.0), 100.0)
    book.begin(transfer("other", alias="b", timeout_s=50.0), 100.0)
    assert book.fail_overdue(101.0 + GRACE_S, 7.0) == []
    (late,) = book.fail_overdue(101.1 + GRACE_S, 7.0)
    assert (late.transfer_id, late.ok, late.code, late.at, late.node_id) == ("soon", False, "timed_out", 7.0, "n1")
    (ended,) = book.fail_of(A, "no_peer", "a has ended", 102.0, 8.0)
    assert (ended.transfer_id, ended.code, ended.seconds) == ("later", "no_peer", 2.0)
    (last,) = book.fail_all("cancelled", "the end", 103.0, 9.0)
    assert (last.transfer_id, last.alias, last.code) == ("other", "b", "cancelled")
    assert book.running == 0
    assert [ask(book, transfer("soon", timeout_s=1.0), 104.0)] == ["failed"]
    assert book.end(A, outcome("soon")) is None


def test_the_oldest_ends_are_forgotten() -> None:
    """There is a bound to what is kept."""
    book = Transfers(10, "n1")
    for number in range(transfers.KEPT + 1):
        book.end(A, outcome(f"t{number}"))
    assert ask(book, transfer("t0"), 0.0) == "new"
    assert ask(book, transfer(f"t{transfers.KEPT}"), 0.0) == "conflict"
