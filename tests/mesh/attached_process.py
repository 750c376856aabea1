"""A process with a region of shared memory, as a program of its own, so that a test can kill it.

``attached_process.py SOCKET SCOPE ALIAS``: prints a line once it is there, takes every connection, begins each
transfer that it is told to do and never ends it.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import Connected, TransferBegun
from computemesh.peer.signals import Accept, Accepted, Answer, Begun, Hello, Order, PutEpochs, PutRegion, Told
from computemesh.peer.socket import AgentSocket

CONTENT = b"what is in there"


def on_told(told: Told) -> Answer | Refused | None:
    match told:
        case Accept():
            return Accepted(body=Connected(link=told.body.link, answers={}))
        case Order():
            return Begun(body=TransferBegun(transfer_id=told.transfer.transfer_id, state="running"))
        case _:
            return None


def main() -> None:
    path, scope, alias = sys.argv[1:]
    here = AgentSocket(Path(path), Hello(scope=scope, alias=alias), on_told=on_told)
    page, memory = os.memfd_create("epochs"), os.memfd_create("kv")
    os.write(page, (7).to_bytes(8, sys.byteorder))
    os.write(memory, CONTENT)
    here.ask(PutEpochs(), [page])
    shm = {"offset": 0, "slot": 0}
    here.ask(PutRegion(name="kv", length=len(CONTENT), epoch=7, writable=False, tokens={"shm": shm}, fds=1), [memory])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
