"""Asks engines of other nodes over the bus, and watches over their answers."""

from __future__ import annotations

from computemesh.answers import Answer
from computemesh.bus import Bus
from computemesh.contracts.base import Refused
from computemesh.contracts.infer import InferAsk


class InferClient:
    """Asks engines on behalf of one process, over one connection.

    ::

        async with InferClient(bus) as engines:
            answer = await engines.open("n1", InferAsk(stream=new_id("i"), model=..., body=...))
            if isinstance(answer, Refused): ...
            async with contextlib.aclosing(answer):
                async for text in answer: ...
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def start(self) -> None:
        """Listens for answers. Before the first :meth:`open`, and once."""

    async def stop(self) -> None:
        """Stops every stream that is open."""

    async def open(self, node_id: str, ask: InferAsk) -> Answer | Refused:
        """Asks an engine of a node, and waits until it begins to answer.

        Args:
            ask: its ``session`` is put in here.

        Returns:
            The answer, or the node's refusal; also one where the node is not there (``node_lost``, 503), is lost before
            the answer begins, or the question is too large for the bus (``too_large``, 413).
        """
        raise NotImplementedError

    async def __aenter__(self) -> InferClient:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
