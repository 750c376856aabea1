"""The command line as people and scripts use it: real processes, what they print, and how they exit.

Method: ``python -m computemesh.cli`` with a home of its own. No engine is needed: nodes without a model do
not announce themselves, so work waits. Each wait is for a condition; nothing looks inside the programs.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from computemesh import __version__
from computemesh.testing.cli import Cli, until
from computemesh.testing.server import running_server

# --- a mesh that runs ---------------------------------------------------------------------------------------------


def test_status_lists_every_service_and_what_there_is_to_do(mesh: Cli) -> None:
    """For people a table, for programs JSON, which holds no secret."""
    text = mesh.ok("status")
    for name in ("nats-server", "node-registry", "work-marshaller", "resource-detector", "node-agent"):
        assert re.search(rf"^{name} +ready +\d+ +0 ", text, re.MULTILINE), text
    assert re.search(r"^nodes: \d+, \d+ online; pending: \d+; running: \d+", text, re.MULTILINE)
    found = mesh.json("status")
    assert (found["ready"], found["embedded"], found["version"]) == (True, True, __version__)
    assert {service["state"] for service in found["services"]} == {"ready"}
    secrets = passwords(mesh)
    assert not [secret for secret in secrets if secret in json.dumps(found) or secret in text]


def test_up_again_says_that_it_runs_and_starts_nothing(mesh: Cli) -> None:
    """In the background and in the foreground alike."""
    before = {process.pid for process in mesh.processes()}
    for words in (("up",), ("up", "--detach", "--no-demo")):
        text = mesh.ok(*words)
        assert "is running already" in text
        assert "work-marshaller" in text
    assert {process.pid for process in mesh.processes()} == before


def passwords(mesh: Cli) -> list[str]:
    """Every secret of a mesh."""
    kept: dict[str, Any] = json.loads((mesh.home / "credentials.json").read_text())
    return [*kept.pop("nodes").values(), *kept.values()]


def test_secrets_lie_in_files_that_only_their_owner_can_read(mesh: Cli) -> None:
    """The home is closed, and so is each file with a password in it."""
    assert mesh.home.stat().st_mode & 0o077 == 0
    secrets = passwords(mesh)
    holders = [
        path
        for path in mesh.home.rglob("*")
        if path.is_file() and path.stat().st_size < 1_000_000 and any(s.encode() in path.read_bytes() for s in secrets)
    ]
    assert {path.name for path in holders} >= {"credentials.json", "mesh.json", "accounts.conf"}
    assert not [path for path in holders if path.stat().st_mode & 0o077]
    assert not [path for path in holders if path.suffix == ".log"]


def test_no_password_is_on_a_command_line(mesh: Cli) -> None:
    """Anybody on the machine can list those."""
    secrets = passwords(mesh)
    lines = [" ".join(process.cmdline()) for process in mesh.processes()]
    assert len(lines) >= 6
    assert not [line for line in lines if any(secret in line for secret in secrets)]


@pytest.mark.parametrize("role", ["client", "node", "observer"])
def test_what_env_prints_a_shell_can_evaluate_and_a_program_can_use(mesh: Cli, role: str) -> None:
    """With nothing but those variables a program reaches the bus in that role, and the services' edges."""
    script = (
        'eval "$("$PY" -m computemesh.cli env --role "$ROLE")" && '
        "unset COMPUTEMESH_HOME && "
        '"$PY" -c "import os, json; print(json.dumps(dict(os.environ)))"'
    )
    shell = subprocess.run(
        ["sh", "-euc", script], capture_output=True, text=True, check=True, timeout=60,
        env=mesh.environment(PY=sys.executable, ROLE=role),
    )  # fmt: skip
    values = json.loads(shell.stdout)
    assert values["NATS_URL"].startswith(f"nats://{role}-" if role == "node" else f"nats://{role}:")
    assert values["COMPUTEMESH_TOKEN"]
    assert stat.S_ISSOCK(Path(values["COMPUTEMESH_PEER_SOCKET"]).stat().st_mode)
    for name in ("NODE_REGISTRY_URL", "WORK_MARSHALING_URL", "RESOURCE_DETECTOR_URL", "NODE_AGENT_URL"):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", values[name])
    elsewhere = Cli(mesh.home.parent / f"elsewhere-{role}")
    assert "nodes" in elsewhere.json("nodes", NATS_URL=values["NATS_URL"])
    assert not elsewhere.home.exists()


def test_a_long_answer_is_whole_however_the_pipe_takes_it(cli: Cli) -> None:
    """Also where Python has no buffer of its own, and the write of it is interrupted half-way."""
    reader, writer = os.pipe()
    room = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        [sys.executable, "-m", "computemesh.cli", "call", "--list", "--json"],
        stdout=writer, env=cli.environment(PYTHONUNBUFFERED="1"),
    )  # fmt: skip
    os.close(writer)

    def waiting() -> int:
        return int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder)

    until(lambda: waiting() >= room, "the pipe to be full")
    process.send_signal(signal.SIGSTOP)
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "it to be stopped")
    process.send_signal(signal.SIGCONT)
    with os.fdopen(reader) as answer:
        assert len(json.loads(answer.read())) > 10
    assert process.wait() == 0


def test_nodes_are_listed(mesh: Cli) -> None:
    """Also one that can run nothing: it has no slots. A filter that is none is refused."""
    until(lambda: mesh.json("nodes")["count"] == 1, "the node to be listed")
    (node,) = mesh.json("nodes")["nodes"]
    assert (node["slots"], node["state"]) == (0, "online")
    assert node["node_id"] in mesh.ok("nodes")
    assert mesh.ok("nodes", "--gpu", "--min-tier", "gpu_peer").strip() == "No such nodes."
    done = mesh.run("nodes", "--min-tier", "BEST")
    assert done.returncode == 2
    assert "AI_FACTORY" in done.stderr.upper()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("item.json", '{"work_id": "from-%s", "work_type": "inference", "payload": {"prompt": "Hi\\t"}}'),
        ("item.yaml", "work_id: from-%s\nwork_type: inference\npayload:\n  prompt: 'Hi'\n"),
        ("-", "work_id: from-%s\nwork_type: inference\n"),
        ("-", '{"work_id": "from-%s", "work_type": "inference"}'),
    ],
    ids=["json", "yaml", "stdin-yaml", "stdin-json"],
)
def test_an_item_comes_from_a_file_or_standard_input(mesh: Cli, tmp_path: Path, name: str, text: str) -> None:
    """And is listed, shown and cancelled by its id."""
    work_id = f"from-{tmp_path.name}"[:60]
    text = text.replace("from-%s", work_id)
    if name != "-":
        (tmp_path / name).write_text(text)
        name = str(tmp_path / name)
    record = mesh.json("submit", name, stdin=text)
    assert (record["work_id"], record["work_type"], record["priority"]) == (work_id, "inference", 5)
    listed = mesh.json("work", "list", "--limit", "1000")
    assert work_id in [item["work_id"] for item in listed["items"]]
    shown = mesh.json("work", "show", work_id)
    assert shown["payload"] == record["payload"]
    assert mesh.json("work", "cancel", work_id, "--reason", "enough")["state"] == "cancelled"


def test_a_yaml_file_may_hold_several_items_and_options_count_for_all(mesh: Cli) -> None:
    """Documents, and lists of items."""
    text = "work_type: inference\n---\n- work_type: inference\n- {work_type: inference, priority: 1}\n"
    records = mesh.json("submit", "-", "--priority", "7", "--model", "m", stdin=text)
    assert [(record["priority"], record["model_name"]) for record in records] == [(7, "m")] * 3
    assert len({record["work_id"] for record in records}) == 3


def test_the_same_work_id_is_the_same_item(mesh: Cli) -> None:
    """However often it is submitted. People see it too."""
    first = mesh.json("submit", "--prompt", "one", "--work-id", "same")
    second = mesh.json("submit", "--prompt", "two", "--work-id", "same")
    assert (second["payload"], second["inbox_seq"]) == ({"prompt": "one"}, first["inbox_seq"])
    assert re.search(r"^same +(pending|assigned) +inference", mesh.ok("work", "list"), re.MULTILINE)
    assert "pending" in mesh.ok("work", "show", "same")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("work_type: inference\nprioritty: 3\n", "prioritty: unknown field (line 2, column 1); did you mean priority?"),
        ("work_type: inference\npriority: 17\n", "priority: "),
        ("work_type: inference\nwork_id: a.b\n", "work_id: an id is one token"),
        ("work_type: inference\nrequirements: {gpus: two}\n", "requirements.gpus: "),
        ("priority: 3\n", "work_type: "),
        ("just text\n", "a work item is a mapping"),
        ("- [1]\n", "a work item is a mapping"),
        ("a: [1\n", ""),
        ("{\n", ""),
        ("", "no work item"),
        ("work_type: inference\npayload: {when: 2024-01-01, what: !!python/object:os.system {}}\n", ""),
        ("work_type: inference\npayload: {seed: 1, seed: 2}\n", "payload.seed stands twice"),
        ("work_type: no-such-work\n", "work_type: there is no work of type 'no-such-work'"),
    ],
)  # fmt: skip
def test_a_wrong_item_is_refused_in_one_line_that_names_the_field(mesh: Cli, text: str, says: str) -> None:
    """Exit status 2."""
    assert says in mesh.fails(2, "submit", "-", stdin=text)


def test_a_file_with_a_wrong_item_is_named_and_submits_none_of_its_items(mesh: Cli, tmp_path: Path) -> None:
    """All are checked before the first is sent."""
    file = tmp_path / "items.yaml"
    file.write_text("work_type: inference\n---\nwork_type: inference\npriority: high\n")
    before = mesh.json("work", "list")["count"]
    said = mesh.fails(2, "submit", str(file))
    assert f"{file}, document 2: priority: " in said
    assert mesh.json("work", "list")["count"] == before


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"work_type: \xff\n", b"\x00\x01\x02"], ids=["16", "utf8", "control"]
)
def test_a_file_that_is_no_text_is_refused_in_one_line(mesh: Cli, tmp_path: Path, content: bytes) -> None:
    """By its name."""
    file = tmp_path / "binary.yaml"
    file.write_bytes(content)
    assert str(file) in mesh.fails(2, "submit", str(file))


def test_an_item_nested_too_deep_is_refused_in_one_line(mesh: Cli) -> None:
    """By our own check or the mesh's, not by a recursion limit."""
    for depth in (100, 5000):
        mesh.fails(
            2, "submit", "-", stdin='{"work_type": "inference", "payload": {"a": ' + "[" * depth + "]" * depth + "}}"
        )


def test_wrong_options_are_explained(mesh: Cli, tmp_path: Path) -> None:
    """Exit status 2, as everywhere in shells."""
    for words, says in (
        (("submit",), "give a FILE or --prompt"),
        (("submit", "-", "--prompt", "x"), "give a FILE or --prompt"),
        (("submit", "--prompt", "x", "--priority", "17"), "17"),
        (("submit", str(tmp_path / "missing.json")), "missing.json"),
        (("work", "list", "--status", "done"), "completed"),
        (("env", "--role", "services"), "client"),
        (("frobnicate",), "frobnicate"),
    ):
        done = mesh.run(*words)
        assert done.returncode == 2, words
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_a_question_about_nothing_is_refused(mesh: Cli) -> None:
    """An id that is none never reaches the mesh."""
    assert "no work item 'nothing'" in mesh.fails(2, "work", "show", "nothing")
    assert "no work item 'nothing'" in mesh.fails(2, "work", "cancel", "nothing")
    assert "an id is one token" in mesh.fails(2, "work", "show", "a.b")
    assert "an id is one token" in mesh.fails(2, "submit", "--prompt", "x", "--work-id", "a b")


def test_waiting_for_work_that_nobody_does_ends_when_told(mesh: Cli) -> None:
    """Exit status 1; the item goes on, and how to look at it is said, after why it waits if that was heard by then."""
    done = mesh.run("submit", "--prompt", "x", "--work-id", "waits", "--wait", "--timeout", "0.3")
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: ")
    assert "computemesh work show waits" in said
    assert mesh.json("work", "show", "waits")["state"] == "pending"


# --- without a mesh ----------------------------------------------------------------------------------------------

COMMANDS: Final = [
    ("status",),
    ("nodes",),
    ("env",),
    ("submit", "--prompt", "x"),
    ("submit", "--prompt", "x", "--wait"),
    ("work", "list"),
    ("work", "show", "w1"),
    ("work", "cancel", "w1"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_without_a_mesh_a_command_says_how_to_start_one(cli: Cli, words: tuple[str, ...]) -> None:
    """One line, exit status 3."""
    said = cli.fails(3, *words)
    assert "no mesh runs" in said
    assert "computemesh up" in said


@pytest.mark.parametrize("words", [("nodes",), ("submit", "--prompt", "x", "--wait")], ids=" ".join)
def test_with_nats_url_of_nobody_a_command_says_so(cli: Cli, words: tuple[str, ...]) -> None:
    """One line with the address, without its password; exit status 3."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = cli.fails(3, *words, NATS_URL=f"nats://client:secret@127.0.0.1:{port}")
    assert f"127.0.0.1:{port}" in said
    assert "computemesh up" in said
    assert "secret" not in said


@pytest.mark.parametrize("url", ["nats://", "nats://127.0.0.1:port"])
def test_a_nats_url_that_is_none_is_refused_in_one_line(cli: Cli, url: str) -> None:
    """It is quoted, so that the slip is seen."""
    said = cli.fails(3, "nodes", NATS_URL=url)
    assert url.partition("://")[2] in said


async def test_wrong_credentials_are_told_from_a_server_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    """One line, exit status 3."""
    async with running_server(tmp_path / "external") as server:
        said = cli.fails(3, "nodes", NATS_URL=f"nats://client:wrong@127.0.0.1:{server.port}")
        assert "uthorization" in said


# --- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "LLM work across your GPU and CPU machines"),
        (("up",), "Start a whole mesh"),
        (("down",), "Stop the mesh"),
        (("status",), "What runs on this machine"),
        (("doctor",), "what is wrong and what to do"),
        (("env",), "shell exports"),
        (("nodes",), "List the nodes"),
        (("submit",), "Submit work"),
        (("work",), "List work items"),
        (("work", "list"), "List work items"),
        (("work", "show"), "Show one item"),
        (("work", "cancel"), "Cancel an item"),
        (("events",), "Show events as they happen"),
        (("call",), "Ask the mesh anything"),
        (("completion",), "makes SHELL complete"),
    ],
    ids=lambda part: str(part)[:12],
)
def test_every_command_says_what_it_does(cli: Cli, words: tuple[str, ...], says: str) -> None:
    """With -h and --help, without a mesh, and for each option too."""
    text = cli.ok(*words, "--help")
    assert says in text
    assert words or cli.ok("-h") == text
    for line in text.partition("Options:")[2].splitlines():
        option = re.match(r"  (-\S.*?)(  +\S|$)", line)
        assert not option or option.group(2) or len(option.group(1)) > 20, f"{line}: says nothing"


def test_the_version_is_told(cli: Cli) -> None:
    """As other programs do."""
    assert cli.ok("--version").strip() == f"computemesh, version {__version__}"
