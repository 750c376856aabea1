"""How long a marshaller waits between two reigns."""

from __future__ import annotations

from computemesh_services.work_marshaller.service import AGAIN_S, AGAIN_S_MAX, STEADY_S, pause_s


def test_the_pause_grows_while_the_server_refuses_to_store() -> None:
    """And not without bound."""
    waits = [AGAIN_S]
    for _ in range(10):
        waits.append(pause_s(waits[-1], 0.1, refused=True))
    assert waits == sorted(waits)
    assert waits[1] == 2 * AGAIN_S
    assert waits[-1] == AGAIN_S_MAX


def test_a_connection_that_breaks_again_and_again_makes_no_pause_longer() -> None:
    """Nor does a refusal after a long reign."""
    assert pause_s(AGAIN_S_MAX, 0.1, refused=False) == AGAIN_S
    assert pause_s(AGAIN_S_MAX, STEADY_S + 1, refused=True) == AGAIN_S
