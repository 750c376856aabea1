"""What operators use: `events`, `call`, completion, and JSON everywhere, on a mesh that runs.

Method: commands as processes, as in ``test_cli.py``; what goes wrong is made to go wrong: processes are halted,
forbidden things tried, servers killed. Each wait is for a condition.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import nats
import pytest

from computemesh.cli.common import CONNECT_S
from computemesh.contracts.base import Role
from computemesh.contracts.services import SERVICES
from computemesh.testing import running_server
from computemesh.testing.cli import WAIT_S, Cli, until
from tests.mesh.findings import examined, pid_of, url_of

# pyright: reportUnknownMemberType=false


def words_of(part: Any) -> str:
    """The words of a command, as the name of its case."""
    return " ".join(map(str, part)) if isinstance(part, tuple) else ""  # pyright: ignore[reportUnknownArgumentType]


# --- events ------------------------------------------------------------------------------------------------------


class Listening:
    """`events` as a process that has subscribed."""

    def __init__(self, cli: Cli, *words: str, **changes: str) -> None:
        self.process = cli.start("events", *words, **changes)
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        assert "listening" in said, said + self.process.stderr.read()

    def end(self) -> tuple[int, str, str]:
        """Its exit status and output, once it ended by itself or was told to."""
        try:
            out, err = self.process.communicate(timeout=WAIT_S)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


def test_events_tells_the_story_of_an_item_a_line_each(mesh: Cli) -> None:
    """For people readable, for programs JSON; and with --count it ends by itself."""
    people = Listening(mesh, "work", "--work-id", "told", "--count", "3")
    programs = Listening(mesh, "--work-id", "told", "--count", "3", "--json")
    waits = Listening(mesh, "--work-id", "told", "--count", "2")  # Only what waits for a moment is told to be pending.
    mesh.ok("submit", "--prompt", "x", "--work-id", "told")
    assert waits.end()[0] == 0
    mesh.ok("work", "cancel", "told", "--reason", "enough")
    status, text, _ = people.end()
    assert status == 0
    assert [line.split()[1:4] for line in text.splitlines()] == [
        ["work.submit", "told", "work_type=inference"],
        ["work.state", "told", "pending"],
        ["work.state", "told", "cancelled"],
    ]
    status, text, _ = programs.end()
    assert status == 0
    lines = [json.loads(line) for line in text.splitlines()]
    assert [set(line) for line in lines] == [{"time", "subject", "headers", "payload"}] * 3
    assert [line["payload"].get("state") for line in lines] == [None, "pending", "cancelled"]
    assert lines[2]["subject"] == "compute.work.state.v1.told"


async def test_events_shows_what_does_not_decode_and_goes_on(mesh: Cli) -> None:
    """Anybody may send anything; the reason is told."""
    listening = Listening(mesh, "work.rejected", "work.submit", "--count", "2", "--json")
    client = await nats.connect(url_of(mesh, Role.CLIENT))
    await client.jetstream().publish("compute.work.submit.v1", b'{"priority": 3}', headers={"traceparent": "00-ab"})
    status, text, _ = listening.end()
    await client.close()
    assert status == 0
    lines = {line["subject"]: line for line in map(json.loads, text.splitlines())}
    bad = lines["compute.work.submit.v1"]
    assert bad["problem"]["field"] == "work_type"
    assert (bad["payload"], bad["headers"]["traceparent"]) == ({"priority": 3}, "00-ab")
    assert lines["compute.work.rejected.v1"]["payload"]["field"] == "work_type"


def test_events_goes_on_after_the_server_was_killed(cli: Cli) -> None:
    """And says that it was away. The same process hears what is said afterwards."""
    cli.up()
    listening = Listening(cli, "work.state", "--json", "--count", "1")
    assert listening.process.stderr is not None
    os.kill(pid_of(cli, "nats-server"), signal.SIGKILL)
    assert "gone" in listening.process.stderr.readline()
    assert "back" in listening.process.stderr.readline()
    until(lambda: cli.run("submit", "--prompt", "x", "--work-id", "after").returncode == 0, "the mesh to answer")
    status, text, _ = listening.end()
    assert status == 0
    assert json.loads(text)["payload"]["work_id"] == "after"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_events_ends_cleanly_when_told(mesh: Cli, number: signal.Signals) -> None:
    """With status 0 and not a word."""
    listening = Listening(mesh)
    listening.process.send_signal(number)
    assert listening.end() == (0, "", "")


def test_events_ends_when_nobody_reads_it_any_more(mesh: Cli) -> None:
    """At once, also while nothing is said: `events | head -1` must not hang."""
    listening = Listening(mesh, "nodes.lost")
    assert listening.process.stdout is not None
    listening.process.stdout.close()
    assert listening.process.wait(WAIT_S) == 0
    assert listening.process.stderr is not None
    assert listening.process.stderr.read() == ""
    listening.process.stderr.close()


def test_events_says_when_what_was_awaited_did_not_come(mesh: Cli) -> None:
    """Exit status 1, so that scripts can wait for something; without --count time is up and that is all."""
    assert mesh.run("events", "nodes.lost", "--count", "1", "--for", "0.3").returncode == 1
    assert mesh.run("events", "nodes.lost", "--for", "0.3").returncode == 0


def test_events_refuses_names_of_nothing_and_subjects_that_are_not_for_it(mesh: Cli) -> None:
    """Waiting for ever in silence would be no answer."""
    assert "did you mean work.state" in mesh.fails(2, "events", "work.stat")
    assert "may not hear" in mesh.fails(2, "events", "orders.>")
    told = mesh.refuses(2, "events", "$KV.>")
    assert (told["field"], told["code"]) == ("subject", "denied")
    assert mesh.run("events", "--where", "x").returncode == 2


# --- call --------------------------------------------------------------------------------------------------------


def test_call_asks_any_request_by_its_short_or_full_name(mesh: Cli, tmp_path: Path) -> None:
    """With the question from the command line, from standard input or from a file."""
    file = tmp_path / "question.yaml"
    file.write_text("limit: 5\n")
    for words, stdin in (
        (("work.list", '{"limit": 5}'), ""),
        (("compute.work.list.v1", "-"), '{"limit": 5}'),
        (("work.list", f"@{file}"), ""),
        (("work.list",), ""),
    ):
        assert set(mesh.json("call", *words, stdin=stdin)) == {"items", "count", "next"}


def test_call_reaches_a_target(mesh: Cli) -> None:
    """In the subject or beside it; without one it says what is missing."""
    node_id = mesh.json("status")["node_id"]
    assert mesh.json("call", "resources.get", "--target", node_id)["node_id"] == node_id
    assert mesh.json("call", f"resources.get.{node_id}")["node_id"] == node_id
    assert mesh.refuses(2, "call", "resources.get")["code"] == "no_target"
    assert mesh.refuses(2, "call", "resources.get", "--target", "a.b")["code"] == "bad_target"
    assert mesh.refuses(2, "call", "work.list", "--target", "x")["code"] == "bad_target"
    assert "nobody answers" in mesh.refuses(3, "call", "resources.get", "--target", "nowhere")["error"]


@pytest.mark.parametrize(
    ("words", "field", "code"),
    [
        (("work.list", '{"limit": 0}'), "limit", "bad_message"),
        (("work.list", '{"limits": 1}'), "limits", "unknown_field"),
        (("work.list", "[1]"), "", "bad_file"),
        (("work.list", "{"), "", "bad_file"),
        (("work.list", "@/nowhere"), "", "bad_file"),
        (("work.get", '{"work_id": "nothing"}'), "work_id", "not_found"),
        (("work.lst",), "subject", "unknown_subject"),
        (("nodes.register", '{"node_id": "x"}'), "role", "wrong_role"),
        (("--raw", "a.*"), "subject", "bad_subject"),
        (("--raw", "$JS.API.INFO"), "subject", "denied"),
        ((), "", "usage"),
    ],
    ids=words_of,
)
def test_a_call_that_cannot_be_made_names_what_is_wrong(
    mesh: Cli, words: tuple[str, ...], field: str, code: str
) -> None:
    """Before anything is sent, or as the mesh says."""
    told = mesh.refuses(2, "call", *words)
    assert (told["field"], told["code"]) == (field, code)


def test_call_in_another_role_and_outside_the_contracts(mesh: Cli) -> None:
    """With the credentials of this home."""
    assert mesh.json("call", "--raw", "$JS.API.INFO", "--role", "services")["streams"] >= 4
    assert mesh.json("call", "--raw", "$SRV.PING")["type"] == "io.nats.micro.v1.ping_response"


async def test_a_call_carries_a_trace_id_and_says_which(cli: Cli, tmp_path: Path) -> None:
    """The answerer finds it in the headers."""
    async with running_server(tmp_path / "external") as server:
        services = await nats.connect(server.url(Role.SERVICES), inbox_prefix=b"_INBOX_services")
        heard: list[dict[str, str]] = []

        async def answer(message: Any) -> None:
            heard.append(message.headers or {})
            await message.respond(b'{"items": [], "count": 0, "new_in_v1": 1}')

        await services.subscribe("compute.work.list.v1", cb=answer)
        await services.flush()
        process = cli.start("call", "work.list", "-v", NATS_URL=server.url(Role.CLIENT), COMPUTEMESH_STRICT="")
        while process.poll() is None:
            await services.flush()
        out, err = process.communicate()
        await services.close()
    assert json.loads(out) == {"items": [], "count": 0, "new_in_v1": 1}
    trace_id = heard[0]["traceparent"].split("-")[1]
    assert len(trace_id) == 32
    assert trace_id in err


def test_what_can_be_called_is_listed_with_its_schema(mesh: Cli) -> None:
    """Also without a mesh: the contracts are ours."""
    named = {request["name"]: request for request in mesh.json("call", "--list")}
    assert named["work.list"]["subject"] == "compute.work.list.v1"
    assert "work.list" in mesh.ok("call", "--list")
    schema = mesh.json("call", "work.list", "--schema")
    assert schema["$defs"]["WorkList"]["properties"]["limit"]["maximum"] == 10_000
    text = mesh.ok("call", "work.request", "--schema")
    assert "priority" in text
    assert "integer 0 to 9" in text


# --- fast failures, completion, JSON ---------------------------------------------------------------------------------


def test_a_server_that_is_not_there_or_refuses_is_told_at_once(mesh: Cli) -> None:
    """Not after the time one waits for a server that is slow. Measured against a command that waits for nothing."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    def took_s(*words: str, **changes: str) -> float:
        began_s = time.monotonic()
        mesh.run(*words, **changes)
        return time.monotonic() - began_s

    wrong = url_of(mesh, Role.CLIENT).replace("client:", "client:x")
    for url in (f"nats://client:x@127.0.0.1:{port}", wrong):
        assert any(took_s("nodes", NATS_URL=url) < 2 * took_s("--version") + CONNECT_S / 2 for _ in range(3))
    assert mesh.refuses(3, "nodes", NATS_URL=wrong)["code"] == "not_admitted"


def test_a_server_that_comes_back_soon_is_waited_for(mesh: Cli) -> None:
    """The supervisor starts it again: a command meanwhile need not fail."""
    os.kill(pid_of(mesh, "nats-server"), signal.SIGKILL)
    until(lambda: mesh.run("nodes").returncode == 0, "an answer")
    until(lambda: not [1 for level, _ in examined(mesh) if level == "problem"], "all to be well again")


COMPLETIONS: Final = [
    ("events wor", ["work", "work.state", "work.submit"]),
    ("events compute.nodes.l", ["compute.nodes.lost.v1"]),
    ("call nodes.", ["nodes.get", "nodes.query", "nodes.register"]),
    ("work show comp", ["completes"]),
    ("work list --status ret", ["retrying"]),
    ("nodes --min-tier AI", ["AI_FACTORY"]),
    ("nodes --work-type i", ["inference"]),
    ("doc", ["doctor"]),
]


def complete(cli: Cli, line: str, **changes: str) -> list[str]:
    """What bash would offer for the last word of a line."""
    words = f"computemesh {line}"
    count = len(words.split()) - (0 if words.endswith(" ") else 1)
    asked = {"_COMPUTEMESH_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    program = "from computemesh.cli import main; main(prog_name='computemesh')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False,
        env=cli.environment(**asked, **changes),
    )  # fmt: skip
    assert done.stderr == ""
    return [offered.partition(",")[2] for offered in done.stdout.splitlines() if offered]


def test_words_complete_from_the_contracts_and_from_the_mesh(mesh: Cli) -> None:
    """Names of ours, and ids of what there is."""
    mesh.ok("submit", "--prompt", "x", "--work-id", "completes")
    for line, offered in COMPLETIONS:
        assert set(offered) <= set(complete(mesh, line)), line


def test_without_a_mesh_completion_offers_what_it_knows_and_is_silent(cli: Cli) -> None:
    """No error in the middle of somebody's command line, whatever NATS_URL says."""
    for changes in ({}, {"NATS_URL": "nats://127.0.0.1:1"}, {"NATS_URL": "nats://127.0.0.1:port"}):
        assert complete(cli, "work show ", **changes) == []
        assert "work.state" in complete(cli, "events work.s", **changes)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_needs(cli: Cli, shell: str) -> None:
    """bash, which is at hand, also takes it."""
    text = cli.ok("completion", shell)
    assert "_COMPUTEMESH_COMPLETE" in text
    if shell == "bash":
        subprocess.run(
            ["bash", "-euc", f"{text}\ncomplete -p computemesh"], check=True, capture_output=True, timeout=30
        )


def test_every_command_that_answers_answers_in_json_too(cli: Cli) -> None:
    """One document each, from the first `up` to the last `down`."""
    started = cli.json("up", "--detach", "--ports", "any", "--nats-port", "0", "--no-demo")
    assert (started["ready"], started["home"], started["first_work_item"]) == (True, str(cli.home), None)
    again = cli.json("up", "--detach")
    assert again["pid"] == started["pid"]
    status = cli.json("status")
    assert set(status["nodes"]) == {"count", "online"}
    assert status["work"] == {"pending": 0, "assigned": 0, "running": 0, "retrying": 0}
    assert status["problem"] == ""
    assert cli.json("env")["NATS_URL"]
    assert cli.json("down", "--purge") == {"home": str(cli.home), "was_running": True, "purged": True}
    assert cli.json("down") == {"home": str(cli.home), "was_running": False, "purged": False}


def test_status_still_tells_what_runs_while_the_bus_is_silent(mesh: Cli) -> None:
    """The document is there, with the problem in it; exit status 3."""
    pid = pid_of(mesh, "work-marshaller")
    os.kill(pid, signal.SIGSTOP)
    try:
        done = mesh.run("status", "--json")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert (found["nodes"], found["work"]) == (None, None)
    assert "no answer" in found["problem"]
    assert len(found["services"]) == len(SERVICES) + 1, "the services and their server"


@pytest.mark.parametrize(
    ("words", "status", "field", "code"),
    [
        (("nodes",), 3, "", "no_mesh"),
        (("submit", "--prompt", "x", "--priority", "10"), 2, "priority", "usage"),
        (("work", "show", "a.b"), 2, "work_id", "bad_message"),
        (("frobnicate",), 2, "", "usage"),
        (("up",), 2, "", "usage"),
    ],
    ids=words_of,
)
def test_errors_are_json_when_answers_are(cli: Cli, words: tuple[str, ...], status: int, field: str, code: str) -> None:
    """On standard error, with the field at fault and what to do."""
    told = cli.refuses(status, *words)
    assert (told["field"], told["code"]) == (field, code)
    assert told["error"]


def test_output_into_a_closed_pipe_is_no_error(mesh: Cli) -> None:
    """`computemesh call --list | head -1` prints one line and not a word more."""
    process = mesh.start("call", "--list")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(WAIT_S) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
