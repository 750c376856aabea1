"""A plain TCP socket: ``python -m tests.bench.programs.raw_socket target|initiator``.

One stream, and a thread that answers.
"""

from __future__ import annotations

import socket
import struct
import sys
from threading import Thread

from tests.bench.programs.transfer import drive, fill, private, serve, target

_REQUEST = struct.Struct("<QQ")


def lend() -> None:
    memory = private()
    fill(memory)
    view = memoryview(memory)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := connection.recv(_REQUEST.size):
            offset, length = _REQUEST.unpack(request)
            connection.sendall(view[offset : offset + length])

    Thread(target=answer, daemon=True).start()
    serve({"port": listener.getsockname()[1]})


def take() -> None:
    connection = socket.create_connection(("127.0.0.1", target()["port"]))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = private()
    view = memoryview(memory)

    def read(wanted: tuple[bytes, memoryview]) -> None:
        request, into = wanted
        connection.sendall(request)
        have = 0
        while have < len(into):
            have += connection.recv_into(into[have:])

    drive(memory, lambda offset, length: (_REQUEST.pack(offset, length), view[offset : offset + length]), read)


if __name__ == "__main__":
    {"target": lend, "initiator": take}[sys.argv[1]]()
