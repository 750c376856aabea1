"""What is counted, for ``/metrics``; answers to processes are, each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, get_args

from prometheus_client import Counter, Gauge

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import Transferred, Transport
from computemesh.peer.errors import outcome_of
from computemesh.peer.signals import Answer, Frame, News, Question, Traffic
from computemesh_services.peer_agent.line import Line

PROCESSES: Final = Gauge("computemesh_peer_processes", "Processes of this node that are peers.")
REGIONS: Final = Gauge("computemesh_peer_regions", "Pieces of memory that they offer.")
LINKS: Final = Gauge("computemesh_peer_links", "Ends of connections that they have.")
RUNNING: Final = Gauge("computemesh_peer_transfers_running", "Transfers that were ordered over the bus and run.")
ASKED: Final = Counter(
    "computemesh_peer_questions_total", "What processes asked, by kind and outcome.", ["kind", "outcome"]
)
REFUSED: Final = Counter("computemesh_peer_refusals_total", "What processes were refused, by code.", ["code"])
TRANSFERS: Final = Counter(
    "computemesh_peer_transfers_total",
    "Transfers that were ordered over the bus, by kind and outcome.",
    ["kind", "outcome"],
)
UNTOLD: Final = Counter(
    "computemesh_peer_transfers_untold_total", "Ends of transfers that were not told, since too many waited."
)
BYTES: Final = Counter(
    "computemesh_peer_transfer_bytes_total", "Bytes that such transfers moved, by transport.", ["transport"]
)
ORDERS: Final = Counter(
    "computemesh_peer_orders_total", "Reads and writes of this node's processes, as they say.", ["transport", "kind"]
)
ORDER_BYTES: Final = Counter("computemesh_peer_order_bytes_total", "Bytes of these.", ["transport", "kind"])
FAILURES: Final = Counter(
    "computemesh_peer_failures_total", "Reads, writes and messages of this node's processes that failed.", ["code"]
)


def refused(code: str) -> None:
    REFUSED.labels(outcome_of(code)).inc()


def answer(line: Line, number: int, ask: Question | News, answer: Answer | Refused, fds: Sequence[int] = ()) -> None:
    kind = type(ask).__name__
    if isinstance(answer, Refused):
        refused(answer.code)
        ASKED.labels(kind, outcome_of(answer.code)).inc()
        line.say(Frame(id=number, refused=answer))
    else:
        ASKED.labels(kind, "ok").inc()
        line.say(Frame(id=number, answer=answer), fds)


def count(ended: Transferred) -> None:
    """Counts a transfer that has ended."""
    TRANSFERS.labels(ended.kind, "ok" if ended.ok else outcome_of(ended.code)).inc()
    if ended.bytes:
        BYTES.labels("+".join(one for one in get_args(Transport) if one in ended.transports)).inc(ended.bytes)


def count_traffic(said: Traffic) -> None:
    """Counts what a process says that it has ordered since the last time."""
    for transport, moves in said.moved.items():
        for kind, orders, moved in (
            ("read", moves.reads, moves.bytes_read),
            ("write", moves.writes, moves.bytes_written),
        ):
            if orders:
                ORDERS.labels(transport, kind).inc(orders)
                ORDER_BYTES.labels(transport, kind).inc(moved)
    for code, failed in said.failed.items():
        FAILURES.labels(outcome_of(code)).inc(failed)
