"""Inference: requests in OpenAI's shapes to the engines of a node, and answers that stream.

    anyone   --ask-->       a node          "chat with this model"; the answer comes in parts as the engine makes it
    the same --control-->   a node          "I have taken so much of it", "stop", "are you there?"
    anyone   --log-->       a node          what an engine has printed

An asker that names its ``session`` is part of a conversation that both sides watch. The node keeps at most ``window``
characters of an answer under way before the asker says that it took some; and it stops a session's streams when it has
not heard of the session for ``SILENT_S``. The asker in turn learns from ``control`` that the node is gone, or has begun
a new life, which knows none of its streams. One that names no session gets all parts as they come.

An answer ends with its last part, or with a refusal in the place of a part. A node that has nothing to say of an answer
says so every ``QUIET_S``, by a part without a text: the NATS server forgets where an answer goes when nothing of it has
come for two minutes. No answer outlives the connection, on either side, that it was asked or is given on.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec

from computemesh.contracts.base import Message, Refusal, Refused, Request, Role
from computemesh.contracts.nodes import Name, Session
from computemesh.contracts.services import NODE_AGENT
from computemesh.ids import Id

WINDOW: Final = 256 * 1024
"""Characters of one answer that may be under way."""

PART_MAX: Final = 64 * 1024
"""Characters in one part, at most."""

SILENT_S: Final = 10.0
"""After so long without a word from a session, its streams are stopped."""

QUIET_S: Final = 20.0
"""After so long without a part of an answer, the node sends an empty one."""

CONTROL_S: Final = 2.0
"""How often a session with open streams lets each node hear from it, at least."""

LOG_PART_MAX: Final = 512 * 1024
LOG_WAIT_S_MAX: Final = 20.0

Position = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""A number of characters, bytes or parts from the beginning."""

Path = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]


class InferAsk(Message, frozen=True, kw_only=True):
    """A request for an engine."""

    stream: Id
    """Names the answer; chosen by the asker, and never the same twice."""
    session: Session = ""
    """One life of the asker; left out, it takes no part in flow control."""
    model: Name
    path: Path = "/v1/chat/completions"
    body: dict[str, Any]
    """What OpenAI's interface takes there. `model` in it is put right by the node; `stream` in it decides whether the
    answer is server-sent events or one JSON object."""
    device: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """The engine that is wished for, as in `EngineCard`; left out, or not to be had, the node chooses."""
    window: Annotated[int, msgspec.Meta(ge=PART_MAX, le=2**31)] = WINDOW
    """Characters of the answer that may be under way, if there is a `session`."""


class InferPart(Message, frozen=True, kw_only=True, omit_defaults=True):
    """A part of an engine's answer. The parts of a stream are numbered from 0, without a gap.

    The answer begins with the first part that has a `content_type`. Parts before it, while an engine is waited for, and
    parts without a text are signs of life.
    """

    seq: Position
    text: str = ""
    """What the engine answered; server-sent events are never cut in two."""
    status: int = 200
    """Where the answer begins: HTTP status of the engine's answer. With another than 200 the text is its complaint."""
    content_type: str = ""
    """Where the answer begins: its media type."""
    device: str = ""
    """Where the answer begins: the engine that gives it."""
    last: bool = False
    """Nothing follows."""
    failed: Refused | None = None
    """In the last part: why the answer is not whole."""


class InferControl(Message, frozen=True, kw_only=True):
    """What an asker tells a node about its streams. Without any it asks whether the node is there."""

    session: Session
    taken: dict[Id, Position] = {}
    """Characters taken of each stream so far, from its beginning."""
    cancel: list[Id] = []
    """Streams whose answers nobody wants any more; their places are free at once."""


class InferControlled(Message, frozen=True, kw_only=True):
    """The node is there."""

    session: Session
    """The node's own. Of streams that were begun in another one, nothing will come any more."""
    unknown: list[Id] = []
    """Of the streams that were named, those that it does not have, or has no more."""


class EngineLogGet(Message, frozen=True, kw_only=True):
    """Asks for what an engine has printed."""

    device: Name
    offset: Position | None = None
    """From this byte on; left out, the last 64 KiB."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LOG_PART_MAX)] = LOG_PART_MAX
    """At most so many bytes."""
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=LOG_WAIT_S_MAX)] = 0.0
    """How long to wait for more when there is nothing yet beyond `offset`."""


class EngineLog(Message, frozen=True, kw_only=True):
    """A part of what an engine has printed."""

    node_id: str
    device: str
    text: str = ""
    """Bytes that are not UTF-8 are replaced."""
    offset: Position = 0
    """Where this part begins; elsewhere than was asked when the log was begun anew."""
    next: Position = 0
    """`offset` of the part that follows."""


_ASKERS: Final = frozenset({Role.CLIENT, Role.SERVICES})

ASK: Final = Request(
    subject="compute.infer.v1",
    target="node_id",
    takes=InferAsk,
    gives=InferPart,
    many=True,
    asked_by=_ASKERS,
    service=NODE_AGENT,
    refuses=(
        Refusal(code="unknown_model", status=404, when="this node does not serve that model"),
        Refusal(code="unavailable", status=503, when="its engine does not serve in time, or the node is ending"),
        Refusal(code="no_engine", status=503, when="no inference engine is installed on the node"),
        Refusal(code="engine_failed", status=503, when="its engine does not start"),
        Refusal(code="engine_lost", status=503, when="its engine ended before it answered"),
        Refusal(code="too_many_requests", status=429, when="each engine that could answer has all it takes"),
        Refusal(code="duplicate_stream", status=409, when="there is a stream of that name already"),
    ),
    example=InferAsk(
        stream="s-1",
        model="smollm2-135m-instruct",
        body={"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 16, "stream": True},
    ),
    about="Asks an engine of a node; the answer streams.",
)
CONTROL: Final = Request(
    subject="compute.infer.control.v1",
    target="node_id",
    takes=InferControl,
    gives=InferControlled,
    asked_by=_ASKERS,
    service=NODE_AGENT,
    about="Takes parts of streams, stops streams, or asks whether the node is there.",
)
LOG: Final = Request(
    subject="compute.infer.log.v1",
    target="node_id",
    takes=EngineLogGet,
    gives=EngineLog,
    asked_by=frozenset({Role.CLIENT, Role.SERVICES, Role.OBSERVER}),
    service=NODE_AGENT,
    refuses=(Refusal(code="not_found", status=404, when="the node has no such engine, or it has printed nothing"),),
    example=EngineLogGet(device="cpu:0"),
    about="What an engine of a node has printed.",
)
