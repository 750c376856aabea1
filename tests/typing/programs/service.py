"""A service of one's own: handlers that fit their contracts, and some that do not."""

from collections.abc import Callable, Mapping
from typing import Any, assert_type

from computemesh.bus import Bus, MicroService
from computemesh.config import ServiceConfig
from computemesh.contracts import nodes, work
from computemesh.contracts.base import AnyBound, Refused, Role, ServiceCard, serve
from computemesh.contracts.work import WorkCancel, WorkGet, WorkItem, WorkRecord
from computemesh.edge import Extra
from computemesh.lifecycle import Spawn, run

TOY = ServiceCard(name="toy", about="A toy.", role=Role.SERVICES, port=8199)


class ToyConfig(ServiceConfig, frozen=True, kw_only=True):
    greeting: str = "hello"


class Toy:
    def __init__(self, bus: Bus, config: ToyConfig) -> None:
        self._bus = bus
        self._config = config

    def endpoints(self) -> list[AnyBound]:
        return [
            serve(work.GET, self.on_get),
            serve(work.GET, self.always_refuses),
            serve(work.CANCEL, self.on_get),  # expect: arg-type reportArgumentType
            serve(nodes.QUERY, self.on_get),  # expect: arg-type reportArgumentType
            serve(work.GET, self.gives_another),  # expect: arg-type reportArgumentType
            serve(work.GET, self.not_async),  # expect: arg-type reportArgumentType
            serve(work.SUBMIT, self.on_get),  # expect: arg-type reportArgumentType
        ]

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None:
        spawn(self._forever())
        spawn(self._forever)  # expect: arg-type reportArgumentType

    async def drain(self) -> None: ...

    def health(self) -> Mapping[str, Any]:
        return {}

    def unready(self) -> str:
        return ""

    async def on_get(self, asked: WorkGet) -> WorkRecord | Refused:
        assert_type(asked.work_id, str)
        return Refused(code="not_found", reason="no such item", status=404)

    async def always_refuses(self, asked: WorkGet) -> Refused:
        return Refused(code="not_found", reason="no such item", status=404)

    async def gives_another(self, asked: WorkGet) -> WorkItem:
        return WorkItem(work_type="toy")

    def not_async(self, asked: WorkGet) -> WorkRecord | Refused:
        return Refused(code="not_found", reason="no such item", status=404)

    async def on_cancel(self, asked: WorkCancel) -> WorkRecord | Refused:
        return Refused(code="not_found", reason="no such item", status=404)

    async def _forever(self) -> None: ...


class NoService:
    """A protocol is a promise: this one has no health."""

    def endpoints(self) -> list[AnyBound]:
        return []

    def extras(self) -> list[Extra]:
        return []

    async def start(self, spawn: Spawn, micro: MicroService) -> None: ...

    async def drain(self) -> None: ...

    def unready(self) -> str:
        return ""


def make(bus: Bus, config: ToyConfig, url: Callable[[], str]) -> Toy:
    return Toy(bus, config)


def make_of_another(bus: Bus, config: int, url: Callable[[], str]) -> Toy:
    raise NotImplementedError


def make_none(bus: Bus, config: ToyConfig, url: Callable[[], str]) -> NoService:
    return NoService()


def main() -> None:
    run(TOY, ToyConfig, make)
    run(TOY, ToyConfig, make_none)  # expect: arg-type reportArgumentType
    run(TOY, ToyConfig, make_of_another)  # expect: arg-type reportArgumentType
