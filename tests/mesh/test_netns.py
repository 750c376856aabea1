"""A node behind NAT and a firewall: it opens no port, and reaches nothing but the NATS server, and serves chat.

Method: the node agent and its llama.cpp server run in a network namespace of their own. Its only way out is a pair of
virtual interfaces; its firewall lets out connections to the NATS server and nothing else, and nothing in. The control
plane runs outside. Needs root, `ip` and `nft`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest

from computemesh.process import end
from computemesh.testing import RunningMesh, running_mesh
from computemesh.testing.mesh import QUICK, STRICT

MODEL: Final = "smollm2-135m-instruct"
NODE: Final = "behind-nat"

WALL: Final = """
table inet wall {{
  chain inward {{
    type filter hook input priority 0; policy drop;
    iifname "lo" accept
    ct state established,related accept
  }}
  chain outward {{
    type filter hook output priority 0; policy drop;
    oifname "lo" accept
    ip daddr {host} tcp dport {port} accept
  }}
}}
"""

pytestmark = pytest.mark.model


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@contextlib.contextmanager
def namespace() -> Generator[tuple[str, str, str]]:
    """A network namespace with one way out.

    Yields:
        Its name, the address of the outside as it sees it, and its own as the outside sees it.
    """
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nft") is None:
        pytest.skip("needs root, `ip` (iproute2) and `nft` (nftables)")
    number = os.getpid() % 10_000
    name, outer, inner = f"cm{number}", f"cm{number}o", f"cm{number}i"
    outside, inside = (f"10.213.{number % 250}.{last}" for last in (1, 2))
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"this machine makes no network namespaces: {made.stderr.strip()}")
    try:
        ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        ip("addr", "add", f"{outside}/30", "dev", outer)
        ip("link", "set", outer, "up")
        ip("-n", name, "addr", "add", f"{inside}/30", "dev", inner)
        ip("-n", name, "link", "set", inner, "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name, outside, inside
    finally:
        ip("netns", "del", name)  # Its interfaces go with it.


@contextlib.asynccontextmanager
async def agent_in(name: str, mesh: RunningMesh, outside: str, folder: Path, http_port: int) -> AsyncGenerator[None]:
    """A node agent that runs in a namespace."""
    inner_url = (await mesh.invite(NODE)).replace("127.0.0.1", outside)
    port = urlsplit(inner_url).port
    wall = WALL.format(host=outside, port=port)
    ip("netns", "exec", name, "nft", wall)
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", name, sys.executable, "-m", "computemesh_services.node_agent"),
        env={
            **os.environ,
            **STRICT,
            **QUICK,
            "NATS_URL": inner_url,
            "COMPUTEMESH_NODE_ID": NODE,
            "COMPUTEMESH_HOME": str(folder / "node"),
            "COMPUTEMESH_PORT": str(http_port),
        },
        start_new_session=True,
    )
    try:
        yield
    finally:
        await end(process, grace_s=20.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def test_a_node_without_an_open_port_serves_chat_through_the_gateway(tmp_path: Path) -> None:
    """Whole and streamed, from a real model; while its own doors cannot be reached from outside."""
    question: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Name a colour."}],
        "max_tokens": 8,
    }
    with namespace() as (name, outside, inside):
        async with running_mesh(tmp_path, ("node-registry", "gateway"), nats_host="0.0.0.0") as mesh:
            port = free_port()
            async with (
                agent_in(name, mesh, outside, tmp_path, port),
                httpx.AsyncClient(base_url=mesh.http("gateway"), timeout=60) as http,
            ):
                deadline_s = asyncio.get_running_loop().time() + 90
                while (answer := await http.post("/v1/chat/completions", json=question)).status_code != 200:
                    assert asyncio.get_running_loop().time() < deadline_s, answer.text
                    await asyncio.sleep(0.3)
                assert answer.json()["choices"][0]["message"]["content"]
                assert answer.json()["usage"]["completion_tokens"] <= 8
                async with http.stream("POST", "/v1/chat/completions", json={**question, "stream": True}) as streamed:
                    lines = [line async for line in streamed.aiter_lines() if line]
                assert len(lines) > 2
                assert lines[-1] == "data: [DONE]"
                with pytest.raises((TimeoutError, OSError)):
                    await asyncio.wait_for(asyncio.open_connection(inside, port), 1)
