"""Calls between peers: a message there, and a message back. ``python rpc.py serve``, and ``python rpc.py``."""

import json
import operator
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from computemesh.peer import PeerAgent, PeerError, start_peer_agent

MESSAGE_MAX = 64 * 1024
SCOPE = "rpc"


def say(agent: PeerAgent, peer: str, what: dict[str, Any]) -> None:
    message = bytearray(json.dumps(what).encode())
    agent.send(peer, (message, 0, len(message))).wait(timeout=10)


class Caller:
    """The methods of a peer. One call at a time."""

    def __init__(self, agent: PeerAgent, peer: str) -> None:
        self.agent, self.peer = agent, peer
        self.answer = bytearray(MESSAGE_MAX)
        agent.connect_to(peer).wait()

    def call(self, method: str, *arguments: Any) -> Any:
        answered = self.agent.recv(self.peer, (self.answer, 0, MESSAGE_MAX))
        say(self.agent, self.peer, {"method": method, "arguments": arguments})
        answered.wait(timeout=10)
        answer = json.loads(self.answer[: answered.received])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


def answer(agent: PeerAgent, caller: str, methods: dict[str, Callable[..., Any]]) -> None:
    """Answers one caller, until it is gone."""
    question = bytearray(MESSAGE_MAX)
    try:
        while True:
            asked = agent.recv(caller, (question, 0, MESSAGE_MAX))
            asked.wait()
            call = json.loads(question[: asked.received])
            try:
                result = {"result": methods[call["method"]](*call["arguments"])}
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            say(agent, caller, result)
    except PeerError as error:
        print(caller, "is gone:", error.code, flush=True)


def serve(agent: PeerAgent, methods: dict[str, Callable[..., Any]]) -> None:
    """Answers everyone who connects, each in a thread of its own."""
    known: set[str] = set()
    while True:
        for peers in agent.get_connections().values():
            for connection in peers.values():
                if connection.is_connected() and connection.link_id not in known:
                    known.add(connection.link_id)
                    threading.Thread(target=answer, args=(agent, connection.peer_alias, methods), daemon=True).start()
        time.sleep(0.02)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        with start_peer_agent(alias="calculator", scope=SCOPE) as agent:
            print("serving", flush=True)
            serve(agent, {"add": operator.add, "upper": str.upper})
    else:
        with start_peer_agent(scope=SCOPE) as agent:
            calculator = Caller(agent, "calculator")
            print("2 + 3 =", calculator.call("add", 2, 3))
            try:
                calculator.call("divide", 2, 0)
            except RuntimeError as error:
                print("refused:", error)
