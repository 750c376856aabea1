"""A program on the bus: what it sends, hears and asks has the types of the contract."""

from typing import assert_type

from computemesh.bus import Bus, Where
from computemesh.contracts import nodes, work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.nodes import NodeList, NodesQuery
from computemesh.contracts.work import WorkGet, WorkItem, WorkProgress, WorkRecord


async def main() -> None:
    bus = Bus(Where(url="nats://127.0.0.1:4222", role=Role.CLIENT, name="mine"))
    await bus.connect(timeout_s=5)

    answer = await bus.ask(work.REQUEST, WorkItem(work_type="inference"))
    assert_type(answer, WorkRecord | Refused)
    answer.work_id  # expect: union-attr reportAttributeAccessIssue reportUnknownMemberType
    if isinstance(answer, Refused):
        return
    assert_type(answer.work_id, str)
    assert_type(await bus.ask(nodes.QUERY, NodesQuery()), NodeList | Refused)
    await bus.ask(work.REQUEST, WorkGet(work_id="w-1"))  # expect: misc reportArgumentType
    await bus.ask(work.REQUEST, {"work_type": "inference"})  # expect: misc reportArgumentType
    await bus.ask(work.SUBMIT, WorkItem(work_type="inference"))  # expect: arg-type reportArgumentType

    assert_type(await bus.store(work.SUBMIT, WorkItem(work_type="inference")), int)
    await bus.store(work.SUBMIT, WorkGet(work_id="w-1"))  # expect: misc reportArgumentType
    await bus.publish(work.PROGRESS, WorkProgress(work_id="w-1", attempt=1, node_id="n1"))
    await bus.publish(work.PROGRESS, WorkItem(work_type="inference"))  # expect: misc reportArgumentType
    await bus.publish(work.REQUEST, WorkItem(work_type="inference"))  # expect: arg-type reportArgumentType

    await bus.subscribe(work.STATE, on_state, target="w-1")
    await bus.subscribe(work.PROGRESS, on_state)  # expect: arg-type reportArgumentType
    await bus.subscribe(work.STATE, not_async)  # expect: arg-type reportArgumentType


async def on_state(record: WorkRecord) -> None:
    assert_type(record, WorkRecord)


def not_async(record: WorkRecord) -> None: ...
