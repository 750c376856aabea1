"""Numbers that come with writes: in their order, and no more of them than there is room for."""

from __future__ import annotations

from functools import partial

import pytest

from computemesh.peer.immediates import Immediates
from computemesh.peer.transport import Outcome


def _hear(_who: int, _outcome: Outcome) -> None:
    pass


def test_each_is_taken_once_in_the_order_in_which_it_came() -> None:
    numbers = Immediates()
    assert [numbers.come(1), numbers.come(2)] == [None, None]
    assert [numbers.take(), numbers.take(), numbers.take()] == [Outcome(imm=1), Outcome(imm=2), None]


def test_those_who_wait_are_told_in_the_order_in_which_they_came() -> None:
    numbers = Immediates()
    first, second = partial(_hear, 1), partial(_hear, 2)
    numbers.wait(first)
    numbers.wait(second)
    assert [numbers.come(1), numbers.come(2), numbers.come(3)] == [first, second, None]


def test_what_nobody_takes_has_bounded_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("computemesh.peer.immediates.KEPT_MAX", 2)
    numbers = Immediates()
    assert not numbers.is_full
    numbers.come(1)
    numbers.come(2)
    assert numbers.is_full
    numbers.take()
    assert not numbers.is_full


def test_at_the_end_those_who_wait_are_known_and_all_is_forgotten() -> None:
    numbers = Immediates()
    numbers.wait(done := partial(_hear, 1))
    assert numbers.drop() == [done]
    numbers.come(1)
    assert numbers.drop() == []
    assert numbers.take() is None


def test_who_waits_no_longer_is_not_told_and_what_is_given_back_comes_first() -> None:
    numbers = Immediates()
    first, second = partial(_hear, 1), partial(_hear, 2)
    numbers.wait(first)
    numbers.wait(second)
    assert [numbers.withdraw(first), numbers.withdraw(first)] == [True, False]
    assert [numbers.come(1), numbers.come(2)] == [second, None]
    assert numbers.give_back(1) is None
    assert [numbers.take(), numbers.take(), numbers.take()] == [Outcome(imm=1), Outcome(imm=2), None]
    numbers.wait(first)
    assert numbers.give_back(1) is first
