"""Reads a peer's memory by a Unix socket, JSON and a memfd: `hosted.py PEER`. Any language can do the same."""

import json
import os
import socket
import struct
import sys
from typing import Any

LENGTH = 4096
if len(sys.argv) != 2 or "COMPUTEMESH_PEER_SOCKET" not in os.environ:
    sys.exit(f"{__doc__} COMPUTEMESH_PEER_SOCKET names the socket of the peer-agent.")
agent = socket.socket(socket.AF_UNIX)
agent.connect(os.environ["COMPUTEMESH_PEER_SOCKET"])


def ask(number: int, question: dict[str, Any], *fds: int) -> dict[str, Any]:
    body = json.dumps({"id": number, "ask": question}).encode()
    socket.send_fds(agent, [struct.pack("!I", len(body)) + body], fds)
    (size,) = struct.unpack("!I", agent.recv(4, socket.MSG_WAITALL))
    frame: dict[str, Any] = json.loads(agent.recv(size, socket.MSG_WAITALL))
    if "refused" in frame:
        sys.exit(f"{frame['refused']['field']}: {frame['refused']['reason']}")
    answer: dict[str, Any] = frame["answer"]
    return answer


me = ask(1, {"kind": "hello", "scope": "job-123", "name_prefix": "reader", "hosted": True})
memory = os.memfd_create("kv", os.MFD_ALLOW_SEALING)
os.ftruncate(memory, LENGTH)
ask(2, {"kind": "put_region", "name": "kv", "length": LENGTH, "epoch": 1, "fds": 1}, memory)
transfer = {
    "transfer_id": "t-1",
    "scope": me["scope"],
    "alias": me["alias"],
    "peer": sys.argv[1],
    "kind": "read",
    "pieces": [{"local": "kv", "length": LENGTH}],
}
outcome = ask(3, {"kind": "hosted_transfer", "transfer": transfer})["outcome"]
print(outcome["ok"], outcome["transports"], outcome["bytes"], outcome["reason"])
print(os.pread(memory, 16, 0))
