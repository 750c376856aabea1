"""Submits an item and waits for its recorded outcome."""

import asyncio
import os
import sys

from computemesh.bus import Bus, Where
from computemesh.contracts import work
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.work import FINAL, WorkItem, WorkRecord
from computemesh.ids import new_id


async def main(prompt: str) -> None:
    bus = Bus(Where(url=os.environ["NATS_URL"], role=Role.CLIENT, name="my-program"))
    await bus.connect(timeout_s=5)
    item = WorkItem(work_id=new_id("w"), work_type="inference", payload={"prompt": prompt, "max_tokens": 32})
    ended: asyncio.Queue[WorkRecord] = asyncio.Queue()

    async def on_state(record: WorkRecord) -> None:
        if record.state in FINAL:
            ended.put_nowait(record)

    # Subscribed before it is submitted, so that no outcome is missed.
    await bus.subscribe(work.STATE, on_state, target=item.work_id or "")
    answer = await bus.ask(work.REQUEST, item)
    if isinstance(answer, Refused):
        sys.exit(f"refused: {answer.field}: {answer.reason}")
    record = await ended.get()
    print(record.state, record.result)
    await bus.close()


asyncio.run(main(sys.argv[1]))
