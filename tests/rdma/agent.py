"""A peer as a program of its own: as ``tests/mesh/agent_process.py``, and it takes and sends messages, too."""

from __future__ import annotations

import json
import sys
from typing import Any

from computemesh.peer import PeerAgent, start_peer_agent

SIZE = 8 << 20
PATTERN = bytes(range(1, 251)) * (SIZE // 250 + 1)


def obey(agent: PeerAgent, memory: bytearray, order: dict[str, Any]) -> Any:
    match order:
        case {"do": "peek", "offset": offset, "length": length}:
            return memory[offset : offset + length].hex()
        case {"do": "imm", "peer": peer}:
            return agent.imm_recv(peer).imm_data()
        case {"do": "recv", "peer": peer, "length": length}:
            into = bytearray(length)
            agent.recv(peer, into).wait()
            return into.hex()
        case {"do": "send", "peer": peer, "length": length}:
            return agent.send(peer, bytes(memory[:length])).wait()
        case {"do": "connections", "peer": peer}:
            return [conn.transport for conn in agent.get_connections()[peer].values()]
        case _:
            raise ValueError(f"order: {order}")


def main() -> None:
    path, alias = sys.argv[1:]
    memory = bytearray(PATTERN[:SIZE])
    with start_peer_agent(path, alias=alias, device="rxe1") as agent:
        agent.register_memory_region("kv", memory)
        say("ready")
        for line in sys.stdin:
            try:
                say(obey(agent, memory, json.loads(line)))
            except Exception as error:
                say({"error": f"{type(error).__name__}: {error}"})


def say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
