"""How many tokens an engine puts out, by its own metrics."""

from __future__ import annotations

import pytest

from computemesh_services.node_agent.engines.rate import WINDOW_S, Rate, tokens_of

# llama.cpp b11549, in the middle of an answer.
METRICS = """\
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed.
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 150
# HELP llamacpp:n_decode_total Total number of llama_decode() calls
# TYPE llamacpp:n_decode_total counter
llamacpp:n_decode_total 200
# HELP llamacpp:n_busy_slots_per_decode Average number of busy slots per llama_decode() call
# TYPE llamacpp:n_busy_slots_per_decode counter
llamacpp:n_busy_slots_per_decode 1.5
"""


@pytest.mark.parametrize(
    ("metrics", "tokens"),
    [
        (METRICS, 300.0),
        (METRICS.replace("llamacpp:n_busy_slots_per_decode 1.5", ""), 150.0),
        ("", None),
        (METRICS.replace("200", "many"), None),
    ],
    ids=["all of it", "an older server", "nothing", "no number"],
)
def test_tokens_are_counted_as_the_engine_goes_and_else_when_requests_end(metrics: str, tokens: float | None) -> None:
    """Its count of tokens stands still while it answers."""
    assert tokens_of(metrics) == tokens


def test_a_rate_is_that_of_the_last_seconds() -> None:
    """What was before is forgotten, what is close together is kept as one."""
    rate = Rate()
    assert rate.per_s(0.0) == 0
    rate.add(30, 1.0)
    rate.add(20, 1.1)
    rate.add(50, 6.0)
    assert rate.per_s(6.0) == 100 / WINDOW_S
    assert rate.per_s(1.1 + WINDOW_S) == 50 / WINDOW_S
    assert rate.per_s(7.0 + WINDOW_S) == 0
