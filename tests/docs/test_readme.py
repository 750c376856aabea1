"""The README, followed: its commands and programs, as they stand there, on a mesh with the real model.

A fenced block under ``<!-- save: NAME -->`` is saved as that file, and the commands of those under
``<!-- run -->`` are run in one shell, in order. Only the port differs, since the usual one may be taken.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
README: Final = (ROOT / "README.md").read_text()
PROGRAM: Final = ROOT / "docs" / "examples" / "program" / "submit.py"

BLOCK: Final = re.compile(r"(?ms)^<!-- (?P<what>save: (?P<name>\S+)|run) -->\n```\w+\n(?P<text>.*?)^```$")
COMMAND: Final = re.compile(r"(?m)^\$ (?P<command>(?:.*\\\n)*.*)$")

WORK_ID: Final = "w-0760b4bd1d875964"
"""The item that the README shows, explains and cancels."""

WAIT_S: Final = 180.0


class Reader:
    """Somebody with the programs of the environment on the PATH, in a folder with the files of the README."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        left_out = ("NATS_URL", "COMPUTEMESH_NATS_URL", "COMPUTEMESH_TOKEN", "COMPUTEMESH_MODELS")
        self.environment = {name: value for name, value in os.environ.items() if name not in left_out}
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment["COMPUTEMESH_HOME"] = str(folder / "home")

    def run(self, script: str, **environment: str) -> str:
        """What a script prints, which must go well from its first to its last command."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Generator[Reader]:
    """After ``computemesh up``, with an item that nobody can run yet."""
    reader = Reader(tmp_path_factory.mktemp("reader"))
    for block in BLOCK.finditer(README):
        if block["name"]:
            (reader.folder / block["name"]).write_text(block["text"])
    try:
        reader.run("computemesh up --detach --ports any --nats-port 0")
        item = {"work_id": WORK_ID, "work_type": "inference", "requirements": {"node_id": "not-there"}}
        reader.run(f"echo '{json.dumps(item)}' | computemesh submit -")
        yield reader
    finally:
        reader.run("computemesh down")


def commands(block: str) -> str:
    """The commands of a block."""
    return "\n".join(found["command"] for found in COMMAND.finditer(block))


@pytest.mark.model
def test_every_command_and_program_of_the_readme_does_what_it_says(reader: Reader) -> None:
    """In the order of the page, in one shell, while its node runs in another."""
    blocks = [commands(block["text"]) for block in BLOCK.finditer(README) if not block["name"]]
    assert len(blocks) >= 3
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    addresses = json.loads(reader.run("computemesh env --json"))
    script = "\n".join(blocks).replace("http://localhost:8118", addresses["WORK_MARSHALING_URL"])
    script = script.replace("http://localhost:8000", addresses["GATEWAY_URL"])
    assert ":8118" not in script
    assert ":8000" not in script
    script = script.replace("http://localhost:3000", addresses["CONTROL_PLANE_URL"])
    assert ":3000" not in script
    reader.run("computemesh nodes invite my-node")
    node_environment = json.loads(reader.run("computemesh env --role node --node my-node --json"))
    node = subprocess.Popen(["python", "node.py"], cwd=reader.folder, env={**reader.environment, **node_environment})
    try:
        reader.run("until computemesh nodes | grep -q shout; do sleep 0.1; done")
        said = reader.run(script)
    finally:
        node.kill()
        node.wait()
    assert said.count("completed") >= 3, said
    assert re.search(r"stored as \d+", said)
    assert '"HELLO"' in said or "HELLO" in said
    assert f'"work_id":"{WORK_ID}"' in said, "the explanation"
    assert '"num_requests":2' in said, "the result of the task"
    assert "b'hello' by shm" in said
    assert '"zmq_address":"tcp://127.0.0.1:6001"' in said.replace(" ", "")


@pytest.mark.model
def test_the_program_of_the_python_interface_prints_the_outcome(reader: Reader) -> None:
    """As on the page ``docs/api.md``."""
    shutil.copy(PROGRAM, reader.folder)
    said = reader.run('eval "$(computemesh env)"\npython submit.py "What is a mesh?"')
    assert said.startswith("completed {")
