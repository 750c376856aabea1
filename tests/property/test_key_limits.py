"""Limits of API keys, whatever is asked and however long it takes.

Method: Hypothesis plays requests of any size that come at any time and use more or less than was estimated. What must
hold is counted beside the meter, from what it let in.
"""

from __future__ import annotations

from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from computemesh.contracts.keys import KeyLimits
from computemesh_services.gateway.limits import MINUTE_S, Booking, Budget, Meter, Over, estimate, span

EPSILON: Final = 1e-3

limits = st.builds(
    KeyLimits,
    requests_per_minute=st.none() | st.integers(1, 100),
    tokens_per_minute=st.none() | st.integers(1, 5000),
    concurrent=st.none() | st.integers(1, 5),
)
# How long after the one before, what it is estimated at, what it uses (None: nobody tells), how many end before it.
step = st.tuples(
    st.floats(0, 90, allow_nan=False),
    st.integers(0, 8000),
    st.none() | st.integers(0, 9000),
    st.integers(0, 3),
)


@settings(max_examples=400, deadline=None)
@given(limits, st.lists(step, max_size=60))
def test_a_key_never_gets_more_than_its_limits_allow(
    limits: KeyLimits, steps: list[tuple[float, int, int | None, int]]
) -> None:
    """Requests in any window, requests at the same time, and tokens in all, but for what engines used unforeseen."""
    now_s, meter = 1000.0, Meter(limits, 1000.0)
    running: list[tuple[Booking, int | None]] = []
    admitted_s: list[float] = []
    spent, most_at_once = 0, 0
    for pause_s, tokens, used, ending in steps:
        now_s += pause_s
        for _ in range(min(ending, len(running))):
            booking, really = running.pop(0)
            booking.end(really, now_s)
            spent += booking.estimate if really is None else really
        told = meter.admit(tokens, now_s)
        if isinstance(told, Booking):
            running.append((told, used))
            admitted_s.append(now_s)
        most_at_once = max(most_at_once, len(running))
        assert meter.running == len(running)
    if limits.concurrent is not None:
        assert most_at_once <= limits.concurrent
    if limits.requests_per_minute is not None:
        for first, begin_s in enumerate(admitted_s):
            for last, end_s in enumerate(admitted_s[first:], first):
                allowed = limits.requests_per_minute * (1 + (end_s - begin_s) / MINUTE_S)
                assert last - first + 1 <= allowed + EPSILON
    if limits.tokens_per_minute is not None:
        left = int(meter.headers(now_s)["x-ratelimit-remaining-tokens"])
        booked = spent + sum(booking.estimate for booking, _ in running)
        earned = limits.tokens_per_minute * (1 + (now_s - 1000.0) / MINUTE_S)
        unforeseen = 9000 * len(steps) if left == 0 else 0
        assert booked + left <= earned + unforeseen + EPSILON


@settings(max_examples=400, deadline=None)
@given(limits, st.lists(step, min_size=1, max_size=30))
def test_who_waits_as_long_as_was_said_is_let_in_and_who_waits_less_is_not(
    limits: KeyLimits, steps: list[tuple[float, int, int | None, int]]
) -> None:
    """Also a request that is larger than a whole budget: it waits until that is full. Nobody waits for ever."""
    now_s, meter = 0.0, Meter(limits, 0.0)
    for pause_s, tokens, used, _ in steps:
        now_s += pause_s
        told = meter.admit(tokens, now_s)
        while isinstance(told, Over):
            assert told.limit != "concurrent", "each request here ends before the next"
            assert 0 < told.wait_s <= 9000 / (limits.tokens_per_minute or 9000) * MINUTE_S + 2 * MINUTE_S
            if told.wait_s > 0.1:
                early = meter.admit(tokens, now_s + 0.9 * told.wait_s)
                assert isinstance(early, Over)
                assert early.limit == told.limit
            now_s += told.wait_s
            limit, told = told.limit, meter.admit(tokens, now_s)
            assert isinstance(told, Booking) or told.limit != limit
        told.end(used, now_s)


@settings(max_examples=200, deadline=None)
@given(limits, st.integers(0, 8000), st.none() | st.integers(0, 9000))
def test_a_request_ends_once_however_often_that_is_told(limits: KeyLimits, tokens: int, used: int | None) -> None:
    """A client that goes away while the engine fails is one request."""
    meter = Meter(limits, 0.0)
    told = meter.admit(tokens, 0.0)
    assert isinstance(told, Booking)
    told.end(used, 1.0)
    once = (meter.running, meter.headers(1.0))
    told.end(0, 1.0)
    told.end(None, 1.0)
    assert (meter.running, meter.headers(1.0)) == once
    assert meter.running == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 100_000), st.lists(st.floats(0, 100, allow_nan=False), max_size=50))
def test_a_budget_fills_evenly_and_never_beyond_a_minute(per_minute: int, pauses: list[float]) -> None:
    """However often it is looked at."""
    looked, alone = Budget(per_minute, 0.0), Budget(per_minute, 0.0)
    looked.spend(per_minute, 0.0)
    alone.spend(per_minute, 0.0)
    now_s = 0.0
    for pause_s in pauses:
        now_s += pause_s
        assert looked.left(now_s) <= per_minute
    assert abs(looked.left(now_s) - min(per_minute, now_s * per_minute / MINUTE_S)) < EPSILON * per_minute
    assert abs(looked.left(now_s) - alone.left(now_s)) < EPSILON * per_minute


def test_a_refusal_costs_nothing() -> None:
    """Whoever asks again and again is let in as soon as one who waited."""
    limits = KeyLimits(requests_per_minute=60, tokens_per_minute=600)
    patient, eager = Meter(limits, 0.0), Meter(limits, 0.0)
    for meter in (patient, eager):
        booking = meter.admit(600, 0.0)
        assert isinstance(booking, Booking)
        booking.end(600, 0.0)
    for tenth in range(1, 10):
        assert isinstance(eager.admit(10, tenth / 10), Over)
    assert isinstance(patient.admit(10, 1.0), Booking)
    assert isinstance(eager.admit(10, 1.0), Booking)


def test_what_an_answer_used_beyond_the_estimate_is_owed_and_what_it_did_not_is_given_back() -> None:
    """The engine's count decides in the end; without one the estimate stands."""
    for used, left in ((0, 600), (100, 500), (None, 400), (600, 0)):
        meter = Meter(KeyLimits(tokens_per_minute=600), 0.0)
        booking = meter.admit(200, 0.0)
        assert isinstance(booking, Booking)
        assert meter.headers(0.0)["x-ratelimit-remaining-tokens"] == "400"
        booking.end(used, 0.0)
        assert meter.headers(0.0)["x-ratelimit-remaining-tokens"] == str(left)
    booking = meter.admit(0, 0.0)
    assert isinstance(booking, Booking)
    booking.end(1200, 0.0)
    told = meter.admit(1, 60.0)
    assert isinstance(told, Over)
    assert (told.limit, round(told.wait_s)) == ("tokens_per_minute", 60)


def test_what_is_given_back_late_does_not_fill_a_budget_beyond_a_minute() -> None:
    """It had filled by itself meanwhile."""
    meter = Meter(KeyLimits(tokens_per_minute=600), 0.0)
    booking = meter.admit(500, 0.0)
    assert isinstance(booking, Booking)
    booking.end(0, 60.0)
    assert meter.headers(60.0)["x-ratelimit-remaining-tokens"] == "600"


def test_a_bound_beyond_the_budget_books_no_more_than_the_budget() -> None:
    """A client that asks for far more than it will use keeps its others waiting for a minute at most."""
    meter = Meter(KeyLimits(tokens_per_minute=100), 0.0)
    assert isinstance(meter.admit(1_000_000, 0.0), Booking)
    told = meter.admit(1, 0.0)
    assert isinstance(told, Over)
    assert told.wait_s <= 1.0


def test_what_is_left_stands_in_the_headers_of_openai() -> None:
    """Whole numbers, rounded down; durations rounded up. A limit that is not set has none."""
    meter = Meter(KeyLimits(requests_per_minute=3, tokens_per_minute=1000), 0.0)
    assert isinstance(meter.admit(250, 0.0), Booking)
    assert meter.headers(0.0) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "20s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "750",
        "x-ratelimit-reset-tokens": "15s",
    }
    assert meter.headers(10.0)["x-ratelimit-remaining-requests"] == "2"
    assert meter.headers(20.0)["x-ratelimit-remaining-requests"] == "3"
    assert Meter(KeyLimits(concurrent=1), 0.0).headers(0.0) == {}


def test_durations_are_written_as_openai_writes_them() -> None:
    """And never shorter than they are."""
    assert [span(s) for s in (0, 0.0001, 0.012, 1, 1.5, 59.9999, 60, 90.95, 360)] == [
        "0ms", "1ms", "12ms", "1s", "1.5s", "1m0s", "1m0s", "1m30.95s", "6m0s"
    ]  # fmt: skip


def test_a_request_is_estimated_from_its_prompt_and_the_bound_on_its_answers() -> None:
    """Four characters are about a token; where the client set no bound, an answer of usual length is expected."""
    assert estimate(4000, 100, 1) == 1100
    assert estimate(4001, 100, 3) == 1301
    assert estimate(0, None, 2) == 512
    assert estimate(10, 0, 1) == 3
