"""What the gateway measures of inference, in Prometheus terms.

Names follow OpenTelemetry's semantic conventions for generative AI where they have one.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_OF: Final = ["gen_ai_operation_name", "gen_ai_request_model"]

DURATION: Final = Histogram(
    "gen_ai_server_request_duration_seconds",
    "Time from a request to the end of its answer, by what it failed of.",
    [*_OF, "error_type"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320),
)
FIRST_TOKEN: Final = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "Time from a request to the first piece of an answer that streams.",
    _OF,
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
PER_TOKEN: Final = Histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Mean time for each token of an answer that streams, after the first.",
    _OF,
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5),
)
TOKENS: Final = Histogram(
    "gen_ai_client_token_usage",
    "Tokens of a request, as its engine counted them.",
    [*_OF, "gen_ai_token_type"],
    buckets=(1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144),
)
REQUESTS: Final = Gauge(
    "computemesh_gateway_requests", "Requests for inference: running on an engine, or waiting for one.", ["state"]
)
RETRIES: Final = Counter(
    "computemesh_gateway_retries_total", "Engines that did not answer a request, by why; another was asked.", ["code"]
)

OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}

_ERRORS: Final = frozenset(
    {
        "", "bad_message", "cancelled", "draining", "duplicate_stream", "engine_failed", "engine_lost", "internal",
        "model_not_found", "no_engine", "node_lost", "stream_broken", "too_large", "too_many_requests", "unavailable",
        "unknown_model",
    }
)  # fmt: skip


def error_type(code: str) -> str:
    """A code as a label: nodes and engines may say anything, and each word would be a series for ever."""
    return code if code in _ERRORS else "other"
