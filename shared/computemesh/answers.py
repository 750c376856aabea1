"""An engine's answer as it streams, wherever the engine is.

The node agent gives one of an engine beside it (``Inference.open``), :class:`~computemesh.infer_client.InferClient`
gives one of an engine on any node.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from computemesh.contracts.base import Refused


class AnswerFailed(Exception):
    """An answer broke off: what came of it is not whole. ``refused.retry`` says whether it is worth asking again."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.refused = refused


class Answer(Protocol):
    """What an engine answers.

    Iterating gives its text, piece by piece as it comes. Server-sent events are never cut in two; several may be in one
    piece. Raises :class:`AnswerFailed` where the answer breaks off.

    Whoever has one closes it, also when it was read to its end: ``async with contextlib.aclosing(answer)``.
    """

    @property
    def status(self) -> int:
        """HTTP status of the engine's answer; with another than 200 the text is its complaint."""
        ...

    @property
    def content_type(self) -> str: ...

    @property
    def device(self) -> str:
        """The engine that answers, as in `EngineCard`."""
        ...

    def __aiter__(self) -> AsyncIterator[str]: ...

    async def aclose(self) -> None:
        """The answer is not wanted any more: its engine is free for others at once."""
        ...
