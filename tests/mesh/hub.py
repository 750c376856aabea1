"""A real HTTP server that speaks the part of the Hugging Face Hub's interface that is needed, with a few odd habits.

As the hub does, it answers a download with a redirect to another host, which must not be told the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Seen:
    """A request that came."""

    path: str
    headers: Mapping[str, str]

    @property
    def begin(self) -> int:
        """The byte that was asked for first."""
        return int(self.headers.get("range", "bytes=0-")[6:].partition("-")[0])


@dataclass
class Hub:
    """What the server has, and how it behaves."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set[str])
    token: str = ""
    """What opens gated repositories."""
    sums: dict[str, str] = field(default_factory=dict[str, str])
    """Checksums that are told in place of the true ones, by file."""
    break_after: int = 0
    """A download breaks off after so many bytes; 0 = never."""
    breaks: int = 0
    """How many downloads still break off."""
    piece: int = 4096
    """Bytes that are sent at a time."""
    pause_s: float = 0.0
    """Between two pieces of a download."""
    ranges: bool = True
    """Whether downloads may begin in the middle."""
    down: int = 0
    """The status that answers everything; 0 = the server is well."""
    seen: list[Seen] = field(default_factory=list[Seen])
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def downloads(self) -> list[Seen]:
        return [one for one in self.seen if one.path.startswith("/cdn/")]

    def listed(self, repo: str) -> dict[str, Any]:
        return {
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "siblings": [
                {
                    "rfilename": name,
                    "size": len(data),
                    "blobId": hashlib.sha1(data).hexdigest(),
                    "lfs": {
                        "size": len(data),
                        "sha256": self.sums.get(name) or hashlib.sha256(data).hexdigest(),
                        "pointerSize": 134,
                    },
                }
                for name, data in self.repos[repo].items()
            ],
        }


@contextmanager
def running_hub(hub: Hub) -> Generator[Hub, None, None]:
    """*hub* on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.seen.append(Seen(path, headers))
            if hub.down:
                self.answer(hub.down, {}, b"")
            elif listing := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
                self.listing(listing[1], listing[2] or "main", headers)
            elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(file[1], file[2], file[3], headers)
            elif file := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
                self.send(hub.repos[file[1]][file[2]], headers)
            else:
                self.answer(404, {}, b"")

        def refused(self, repo: str, revision: str, headers: Mapping[str, str], *, download: bool) -> bool:
            if repo not in hub.repos:
                self.answer(401, {"X-Error-Message": "Invalid username or password."}, b"")
            elif download and repo in hub.gated and headers.get("authorization") != f"Bearer {hub.token}":
                self.answer(401, {"X-Error-Code": "GatedRepo"}, b"")
            elif revision not in ("main", COMMIT):
                self.answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")
            else:
                return False
            return True

        def listing(self, repo: str, revision: str, headers: Mapping[str, str]) -> None:
            if not self.refused(repo, revision, headers, download=False):
                self.answer(200, {"Content-Type": "application/json"}, json.dumps(hub.listed(repo)).encode())

        def resolve(self, repo: str, revision: str, name: str, headers: Mapping[str, str]) -> None:
            if not self.refused(repo, revision, headers, download=True):
                data = hub.repos[repo][name]
                told = {
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Size": str(len(data)),
                    "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                }
                self.answer(302, {**told, "Location": f"http://localhost:{hub.port}/cdn/{repo}/{name}"}, b"")

        def send(self, data: bytes, headers: Mapping[str, str]) -> None:
            if not hub.ranges:
                headers = {name: value for name, value in headers.items() if name != "range"}
            begin = Seen("", headers).begin
            if begin >= len(data):
                self.answer(416, {}, b"")
                return
            self.send_response(206 if "range" in headers else 200)
            self.send_header("Content-Length", str(len(data) - begin))
            if "range" in headers:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            end = len(data)
            if hub.breaks:
                hub.breaks -= 1
                end = min(end, begin + hub.break_after)
            for at in range(begin, end, hub.piece):
                self.wfile.write(data[at : min(end, at + hub.piece)])
                self.wfile.flush()
                time.sleep(hub.pause_s)
            self.close_connection = end < len(data)

        def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as the base class calls it.
            """Nobody reads it."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes is no fault."""

    with Server(("127.0.0.1", 0), Handler) as server:
        hub.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
