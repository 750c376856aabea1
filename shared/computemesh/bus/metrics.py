"""What the bus connection of this process measures, in Prometheus terms.

Names follow OpenTelemetry's semantic conventions for RPC and messaging where they have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import REGISTRY, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SYSTEM: Final = "nats"

CALLS: Final = Histogram(
    "rpc_server_call_duration_seconds",
    "Time from a request's arrival to its answer, by subject and status.",
    ["rpc_system_name", "rpc_method", "rpc_response_status_code"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)


class ConnectionCollector(Collector):
    """Reads the connection's counters when someone asks, so that counting costs nothing on the way.

    Args:
        stats: the counters of the NATS client.
        up: whether the connection stands.
    """

    def __init__(self, stats: Callable[[], Mapping[str, int]], up: Callable[[], bool]) -> None:
        self._stats = stats
        self._up = up

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, about, key in _COUNTERS:
            counter = CounterMetricFamily(name, about, labels=["messaging_system"])
            counter.add_metric([SYSTEM], stats.get(key, 0))
            yield counter
        yield GaugeMetricFamily("nats_client_connected", "1 while the connection to NATS stands.", float(self._up()))


_COUNTERS: Final = (
    ("messaging_client_sent_messages", "Messages sent to NATS.", "out_msgs"),
    ("messaging_client_consumed_messages", "Messages received from NATS.", "in_msgs"),
    ("nats_client_sent_bytes", "Payload bytes sent to NATS.", "out_bytes"),
    ("nats_client_received_bytes", "Payload bytes received from NATS.", "in_bytes"),
    ("nats_client_reconnects", "Times the connection to NATS was made again.", "reconnects"),
    ("nats_client_errors", "Errors the NATS server or client reported.", "errors_received"),
)


def expose(stats: Callable[[], Mapping[str, int]], up: Callable[[], bool]) -> None:
    """Adds this process's connection to ``/metrics``. Called once in the life of a process."""
    REGISTRY.register(ConnectionCollector(stats, up))
