"""OpenAI's interface over HTTP, as the gateway and each node agent have it.

What is declared here of a request is what is checked. All other fields go to the engine as they are: engines know more
of them than we do.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from computemesh.contracts.base import Http, Message, Refusal, Route, ServiceCard
from computemesh.contracts.nodes import Name
from computemesh.contracts.services import GATEWAY, NODE_AGENT

EVENTS: Final = "text/event-stream"
"""Media type of an answer that streams."""

Tokens = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
Several = Annotated[int, msgspec.Meta(ge=1, le=128)]


class ApiError(Message, frozen=True, kw_only=True):
    message: str
    """One sentence for a person, with the numbers that decided."""
    type: str
    """Kind of error, as OpenAI calls it: `invalid_request_error`, `rate_limit_error`, `server_error` …"""
    param: str | None
    """The field at fault; null when no single field is."""
    code: str | None
    """Machine-readable, `snake_case`."""


class ApiRefusal(Message, frozen=True, kw_only=True):
    """A refusal in OpenAI's shape."""

    error: ApiError


class StreamOptions(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    include_usage: bool | None = None
    """Whether the last event before the end tells the usage."""


class ChatMessage(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    role: str
    """`system`, `user`, `assistant`, `tool` …"""
    content: str | list[dict[str, Any]] | None = None
    """Text, or parts; an assistant's message with tool calls has none."""


class Generation(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """What a request for text says, whatever the text follows."""

    model: Name
    """As in `/v1/models`."""
    stream: bool | None = None
    """Answers with server-sent events as the text is made."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    n: Several | None = None
    """Answers to the same question."""


class ChatRequest(Generation, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A conversation to go on with. Further fields go to the engine as they are."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_tokens: Tokens | None = None
    """Bound on the answer; -1 for as many as the context holds."""
    max_completion_tokens: Tokens | None = None
    """The newer name of `max_tokens`."""


class CompletionRequest(Generation, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A text to go on with. Further fields go to the engine as they are."""

    prompt: str | list[Any]
    """A text or its tokens, or several of either."""
    max_tokens: Tokens | None = None
    """Bound on the answer; -1 for as many as the context holds."""


class EmbeddingRequest(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Texts to turn into vectors. Further fields go to the engine as they are."""

    model: Name
    """As in `/v1/models`."""
    input: Annotated[str, msgspec.Meta(min_length=1)] | Annotated[list[Any], msgspec.Meta(min_length=1)]
    """A text or its tokens, or several of either."""


class Model(Message, frozen=True, kw_only=True):
    """A model that can be asked."""

    id: str
    object: str = "model"
    created: int = 0
    """Unix seconds since it is known."""
    owned_by: str = "computemesh"
    nodes: list[str] = []
    """Which nodes serve it."""
    loaded: bool = False
    """It is in memory of at least one, and answers at once."""
    context_tokens: int | None = None
    """Longest prompt and answer together; the longest of all nodes."""
    embeddings: bool = False
    """It gives embeddings, not texts."""


class OutOfReach(Message, frozen=True, kw_only=True):
    """Models that are known, but on no node that can be asked now."""

    unavailable_models: list[str] = []


class Models(Message, frozen=True, kw_only=True):
    """The models that can be asked now."""

    object: str = "list"
    data: list[Model] = []
    rolemesh: OutOfReach = OutOfReach()


class ModelsGet(Message, frozen=True, kw_only=True):
    pass


class ModelGet(Message, frozen=True, kw_only=True):
    model: Name


ENTRY: Final = (
    Refusal(code="invalid_api_key", status=401, when="a key is needed, and the call shows none, or an unknown one"),
    Refusal(code="bad_origin", status=403, when="a page of another origin calls"),
    Refusal(code="bad_host", status=421, when="on loopback, the edge was called by a name that is not this machine's"),
    Refusal(code="internal", status=500, when="the service failed; its log says why"),
    Refusal(code="unavailable", status=503, when="the bus, or each node that could answer, is away for the moment"),
)
BAD_MESSAGE: Final = Refusal(
    code="bad_message", status=400, when="the request is not as described here; `param` says where"
)
_UNKNOWN: Final = Refusal(code="model_not_found", status=404, when="no node serves that model")
_ASKED: Final = (
    BAD_MESSAGE,
    *ENTRY,
    _UNKNOWN,
    Refusal(code="too_large", status=413, when="the body is larger than a message may be"),
    Refusal(code="bad_content_type", status=415, when="the body is not declared as `application/json`"),
    Refusal(code="too_many_requests", status=429, when="every engine is busy, and none fell free in time"),
    Refusal(code="engine_failed", status=502, when="the engine's answer broke off"),
)
_LIMITED: Final = (
    Refusal(code="model_not_allowed", status=403, when="the key is for other models"),
    Refusal(code="rate_limit_exceeded", status=429, when="a limit of the key is reached; `Retry-After` says how long"),
)
"""What the gateway refuses besides, which knows keys with limits."""


def routes_of(service: ServiceCard) -> tuple[Route, ...]:
    """The routes of a service that has this interface; none for any other."""
    if service not in (GATEWAY, NODE_AGENT):
        return ()
    asked = (*_ASKED, *_LIMITED) if service is GATEWAY else _ASKED
    return (
        Route(
            name="list_models",
            service=service,
            http=Http(method="GET", path="/v1/models"),
            takes=ModelsGet,
            gives=Models,
            refused_as=ApiRefusal,
            refuses=(BAD_MESSAGE, *ENTRY),
            example=ModelsGet(),
            about="The models that can be asked now.",
        ),
        Route(
            name="get_model",
            service=service,
            http=Http(method="GET", path="/v1/models/{model}"),
            takes=ModelGet,
            gives=Model,
            refused_as=ApiRefusal,
            refuses=(BAD_MESSAGE, *ENTRY, _UNKNOWN),
            example=ModelGet(model="smollm2-135m-instruct"),
            about="One of them.",
        ),
        Route(
            name="create_chat_completion",
            service=service,
            http=Http(method="POST", path="/v1/chat/completions"),
            takes=ChatRequest,
            gives=Any,
            gives_events=True,
            refused_as=ApiRefusal,
            refuses=asked,
            example=ChatRequest(
                model="smollm2-135m-instruct",
                messages=[ChatMessage(role="user", content="Name a colour.")],
                max_tokens=16,
            ),
            about="The next message of a conversation: as OpenAI's, whole or, with `stream`, as it is made.",
        ),
        Route(
            name="create_completion",
            service=service,
            http=Http(method="POST", path="/v1/completions"),
            takes=CompletionRequest,
            gives=Any,
            gives_events=True,
            refused_as=ApiRefusal,
            refuses=asked,
            example=CompletionRequest(model="smollm2-135m-instruct", prompt="A mesh is", max_tokens=16),
            about="How a text goes on: as OpenAI's, whole or, with `stream`, as it is made.",
        ),
        Route(
            name="create_embedding",
            service=service,
            http=Http(method="POST", path="/v1/embeddings"),
            takes=EmbeddingRequest,
            gives=Any,
            refused_as=ApiRefusal,
            refuses=(*asked, Refusal(code="unsupported", status=501, when="the model gives no embeddings")),
            example=EmbeddingRequest(model="smollm2-135m-instruct", input="A mesh."),
            about="Vectors of texts: as OpenAI's.",
        ),
    )
