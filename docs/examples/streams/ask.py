"""Asks an engine of a node over NATS and prints its answer as it comes. Nothing of computemesh is needed."""

import asyncio
import json
import os
import sys
import uuid

import nats


async def main(node_id: str, model: str, prompt: str) -> None:
    nc = await nats.connect(os.environ["NATS_URL"])
    inbox = nc.new_inbox()
    parts = await nc.subscribe(inbox)
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64, "stream": True}
    ask = {"stream": f"s-{uuid.uuid4().hex}", "model": model, "body": body}
    await nc.publish(f"compute.infer.v1.{node_id}", json.dumps(ask).encode(), reply=inbox)
    number = 0
    while True:
        message = await parts.next_msg(timeout=60)
        headers = message.headers or {}
        if headers.get("Status") == "503":
            sys.exit(f"node {node_id} is not there")
        part = json.loads(message.data)
        if "Nats-Service-Error" in headers:
            sys.exit(f"refused: {part['reason']}")
        if part["seq"] != number:
            sys.exit("a part was lost")
        number += 1
        for event in part.get("text", "").splitlines():
            if event.startswith("data: {"):
                for choice in json.loads(event.removeprefix("data: "))["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
        if failed := part.get("failed"):
            sys.exit(f"\nbroken off: {failed['reason']}")
        if part.get("last"):
            break
    print()
    await nc.close()


asyncio.run(main(*sys.argv[1:]))
