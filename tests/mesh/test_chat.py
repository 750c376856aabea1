"""`chat`: one answer for scripts, and a conversation on a terminal.

Method: the command as a process on a mesh of its own, its gateway included; conversations on a terminal of their own.
The engine is a node of the test, so that it says what the test wants, and stops where it is told to.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import AsyncGenerator, Generator

import pytest
import pytest_asyncio

from computemesh.bus import Bus, Where
from computemesh.contracts.base import Refused, Role
from computemesh.contracts.infer import InferAsk
from computemesh.testing import until
from computemesh.testing.cli import WAIT_S, Cli
from tests.mesh.engine_node import EngineNode

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "tiny"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(mesh: Cli) -> AsyncGenerator[EngineNode]:
    """What answers ``far:0 far:1 …``, known to the gateway."""
    invited = await asyncio.to_thread(mesh.json, "nodes", "invite", "far")
    bus = Bus(Where(url=invited["NATS_URL"], role=Role.NODE, name="far"))
    await bus.connect(timeout_s=5.0)
    node = EngineNode(bus, "far", [MODEL])
    await node.join()
    try:
        async with asyncio.timeout(WAIT_S):
            while (await run(mesh, MODEL, "?", "--max-tokens", "1")).returncode != 0:
                await asyncio.sleep(0.1)
        yield node
        await node.leave()
    finally:
        await bus.close()


@pytest.fixture(autouse=True)
def at_ease(engine: EngineNode) -> Generator[None]:
    """Each test begins with an engine that answers, and has been asked nothing."""
    engine.asked.clear()
    yield
    engine.refuses, engine.breaks, engine.stops_at = None, None, 0
    engine.go.set()


async def run(mesh: Cli, *words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(mesh.run, "chat", *words, stdin=stdin, **environment)


async def ok(mesh: Cli, *words: str, stdin: str = "") -> str:
    done = await run(mesh, *words, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "how fast it was is for people at a terminal"
    return done.stdout


def said(engine: EngineNode) -> list[str]:
    """What the engine was asked last."""
    return [f"{message['role']}: {message['content']}" for message in engine.asked[-1].body["messages"]]


# --- one answer --------------------------------------------------------------------------------------------------


async def test_a_prompt_is_answered_on_standard_output_and_nothing_else_is_there(mesh: Cli, engine: EngineNode) -> None:
    """As arguments or on standard input; the options go along."""
    assert (
        await ok(mesh, MODEL, "Name", "a colour.", "--max-tokens", "3", "--system", "Be brief.")
        == "far:0 far:1 far:2 \n"
    )
    assert said(engine) == ["system: Be brief.", "user: Name a colour."]
    assert await ok(mesh, MODEL, "--max-tokens", "1", "--temperature", "0", stdin="two\nlines\n") == "far:0 \n"
    assert said(engine) == ["user: two\nlines"]
    assert (engine.asked[-1].body["max_tokens"], engine.asked[-1].body["temperature"]) == (1, 0)


async def test_without_a_model_the_only_one_is_asked(mesh: Cli, engine: EngineNode) -> None:
    """With an empty name, as a script may give it, too."""
    assert await ok(mesh, "--max-tokens", "1", stdin="Hello?") == "far:0 \n"
    assert await ok(mesh, "", "Hello?", "--max-tokens", "1") == "far:0 \n"


async def test_for_programs_there_is_one_document(mesh: Cli) -> None:
    """The text, what it cost, and how fast it was."""
    told = json.loads(await ok(mesh, MODEL, "Hello?", "--max-tokens", "3", "--json"))
    assert (told["text"], told["model"], told["node"], told["finish_reason"]) == (
        "far:0 far:1 far:2 ",
        MODEL,
        "far",
        "stop",
    )
    assert told["usage"] == {"prompt_tokens": 7, "completion_tokens": 3}
    assert 0 < told["ttft_ms"] <= told["duration_ms"]


@pytest.mark.parametrize(
    ("words", "status", "code", "words_said"),
    [
        (("unknown", "Hello?"), 2, "model_not_found", "there is tiny"),
        ((MODEL,), 2, "failed", "no prompt"),
        ((MODEL, "x", "--url", "http://127.0.0.1:1"), 3, "no_answer", "does not answer"),
        ((MODEL, "x", "--url", "nowhere"), 2, "failed", "http://HOST:PORT"),
        ((MODEL, "x", "--max-tokens", "0"), 2, "usage", "--max-tokens"),
    ],
)
async def test_what_cannot_be_done_is_said_in_a_line(
    mesh: Cli, words: tuple[str, ...], status: int, code: str, words_said: str
) -> None:
    """With what to do about it."""
    told = await asyncio.to_thread(mesh.refuses, status, "chat", *words)
    assert told["code"] == code
    assert words_said in f"{told['error']} {told['hint']}"


async def test_a_refusal_and_an_answer_that_breaks_off_are_told_apart(mesh: Cli, engine: EngineNode) -> None:
    """2 and nothing printed; 1 and what came so far."""
    engine.refuses = Refused(code="bad_message", reason="no such sampler", field="sampler")
    refused = await run(mesh, MODEL, "Hello?")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: no such sampler")
    engine.refuses = None
    engine.breaks = (2, Refused(code="engine_lost", reason="the engine ended", status=502))
    broken = await run(mesh, MODEL, "Hello?", "--max-tokens", "5")
    assert (broken.returncode, broken.stdout) == (1, "far:0 far:1 \n")
    assert broken.stderr.startswith("error: the answer broke off: the engine ended")


async def test_a_reader_that_has_enough_ends_it(mesh: Cli, engine: EngineNode) -> None:
    """`chat … | head -c 5`: no error, and the engine is told."""
    engine.stops_at = 1
    engine.go.clear()
    process = await asyncio.to_thread(mesh.start, "chat", MODEL, "Hello?", "--max-tokens", "5")
    assert process.stdout is not None
    assert process.stderr is not None
    assert await asyncio.to_thread(process.stdout.read, 5) == "far:0"
    process.stdout.close()
    engine.go.set()
    assert await asyncio.to_thread(process.wait, WAIT_S) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


async def test_with_keys_the_mesh_s_own_token_is_shown_to_its_own_gateway_only(mesh: Cli, engine: EngineNode) -> None:
    """Another address gets the key that it was given for, or none."""
    status = json.loads((mesh.home / "run" / "mesh.json").read_text())
    url = next(service["http"] for service in status["services"] if service["name"] == "gateway")
    key = (await asyncio.to_thread(mesh.ok, "keys", "create", "alice", "--model", "other")).strip()
    try:
        assert (await run(mesh, MODEL, "Hello?")).returncode == 0
        async with asyncio.timeout(WAIT_S):
            while "key" not in (await run(mesh, MODEL, "Hello?", "--url", url)).stderr:
                await asyncio.sleep(0.1)
        stranger = await run(mesh, MODEL, "Hello?", "--url", f"{url}/v1/", "--key", "wrong")
        assert (stranger.returncode, "not known" in stranger.stderr) == (2, True)
        sees_none = await run(mesh, MODEL, "Hello?", "--url", url, COMPUTEMESH_API_KEY=key)
        assert "no model 'tiny' can be asked" in sees_none.stderr
        other = await run(mesh, MODEL, "Hello?", GATEWAY_URL=url, COMPUTEMESH_TOKEN=status["token"])
        assert other.returncode == 0, other.stderr
    finally:
        await asyncio.to_thread(mesh.ok, "keys", "revoke", "alice")


# --- a conversation ----------------------------------------------------------------------------------------------


class Terminal:
    """A conversation on a terminal of its own."""

    def __init__(self, cli: Cli, *words: str) -> None:
        primary, secondary = pty.openpty()
        fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.text = ""
        self._fd = primary
        self.process = subprocess.Popen(
            [sys.executable, "-m", "computemesh.cli", "chat", *words],
            stdin=secondary, stdout=secondary, stderr=secondary,
            env=cli.environment(TERM="dumb"), preexec_fn=_own_terminal,  # noqa: PLW1509  # two calls of the kernel
        )  # fmt: skip
        os.close(secondary)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self._fd, 65536):
                self.text += data.decode("utf-8", "replace").replace("\r", "")
        except OSError:  # The terminal of a process that has ended.
            return

    async def shows(self, words: str, times: int = 1) -> None:
        await until(lambda: self.text.count(words) >= times, what=f"{words!r} in {self.text!r}")

    async def at_prompt(self, times: int) -> None:
        """It waits for a line, for the so-manieth time."""
        await until(lambda: self.text.count("\n> ") >= times, what=f"prompt {times} in {self.text!r}")

    def types(self, text: str) -> None:
        os.write(self._fd, text.encode())

    async def ends(self) -> int:
        return await asyncio.to_thread(self.process.wait, WAIT_S)


def _own_terminal() -> None:
    """Makes standard input the terminal that a key such as Ctrl-C acts on."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


async def test_a_conversation_goes_on_from_what_was_said(mesh: Cli, engine: EngineNode) -> None:
    """Commands change it; how fast an answer was is told; Ctrl-D ends it well."""
    terminal = Terminal(mesh, MODEL, "--max-tokens", "2", "--system", "Be brief.")
    await terminal.at_prompt(1)
    terminal.types("Hello?\n")
    await terminal.shows("far:0 far:1")
    await terminal.shows("on far")
    await terminal.at_prompt(2)
    terminal.types("And \\\nthen?\n")
    await terminal.shows("on far", times=2)
    assert said(engine) == [
        "system: Be brief.", "user: Hello?", "assistant: far:0 far:1 ", "user: And \nthen?",
    ]  # fmt: skip
    await terminal.at_prompt(3)
    terminal.types("/clear\n")
    await terminal.shows("Forgotten.")
    terminal.types("/system Be long.\n")
    await terminal.shows("System prompt: Be long.")
    terminal.types("Again?\n")
    await terminal.shows("on far", times=3)
    assert said(engine) == ["system: Be long.", "user: Again?"]
    await terminal.at_prompt(6)
    terminal.types("\x04")
    assert await terminal.ends() == 0


async def test_ctrl_c_stops_an_answer_and_not_the_conversation(mesh: Cli, engine: EngineNode) -> None:
    """The engine is told at once; what was said so far is kept."""
    engine.stops_at = 2
    engine.go.clear()
    terminal = Terminal(mesh, MODEL, "--max-tokens", "5")
    await terminal.at_prompt(1)
    terminal.types("Hello?\n")
    await terminal.shows("far:0 far:1")
    terminal.types("\x03")
    await terminal.shows("stopped")
    await until(lambda: engine.cancelled[-1:] == [engine.asked[-1].stream], what="the engine to be told")
    engine.go.set()
    await terminal.at_prompt(2)
    terminal.types("\x03")
    await terminal.shows("Ctrl-D ends", times=2)
    terminal.types("Go on.\n")
    await terminal.shows("far:4")
    assert said(engine) == ["user: Hello?", "assistant: far:0 far:1 ", "user: Go on."]
    terminal.types("/exit\n")
    assert await terminal.ends() == 0


async def test_a_question_that_fails_leaves_the_conversation_as_it_was(mesh: Cli, engine: EngineNode) -> None:
    """What went wrong is told in a line."""
    terminal = Terminal(mesh, MODEL, "--max-tokens", "1")
    await terminal.at_prompt(1)
    engine.refuses = Refused(code="bad_message", reason="not this one")
    terminal.types("Bad?\n")
    await terminal.shows("error: not this one")
    engine.refuses = None
    await terminal.at_prompt(2)
    terminal.types("Good?\n")
    await terminal.shows("on far")
    assert said(engine) == ["user: Good?"]
    terminal.process.send_signal(signal.SIGTERM)
    assert await terminal.ends() == -signal.SIGTERM


async def test_what_a_model_says_cannot_steer_the_terminal(
    mesh: Cli, engine: EngineNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a pipe it goes as it is."""
    spoilt = json.dumps({"choices": [{"index": 0, "delta": {"content": "a\x1b[2Jb"}}]})

    def texts(_asked: InferAsk) -> list[str]:
        return [f"data: {spoilt}\n\n", "data: [DONE]\n\n"]

    monkeypatch.setattr(engine, "_texts", texts)
    terminal = Terminal(mesh, MODEL, "Hello?")
    assert await terminal.ends() == 0
    await terminal.shows("a\\x1b[2Jb")
    assert "\x1b[2J" not in terminal.text
    assert await ok(mesh, MODEL, "Hello?") == "a\x1b[2Jb\n"
