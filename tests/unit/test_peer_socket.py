"""A process's end of the socket to its peer-agent, over a real Unix socket: questions, what is told, and what happens
when the peer-agent ends and comes back."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import pytest

from computemesh.contracts.base import Refused
from computemesh.contracts.peers import (
    Connect,
    Connected,
    Peer,
    Piece,
    Region,
    Resolve,
    Transfer,
    TransferBegun,
    Transferred,
)
from computemesh.peer.errors import PeerError
from computemesh.peer.frames import Outbox, Said, Splitter, close_fds, pack, receive
from computemesh.peer.signals import (
    Accept,
    Accepted,
    Aliases,
    Answer,
    Begun,
    Call,
    Called,
    Done,
    DropRegion,
    Ended,
    Frame,
    Hello,
    ListPeers,
    Lost,
    Order,
    PutEpochs,
    PutRegion,
    RegionsResolved,
    Told,
    Welcome,
)
from computemesh.peer.socket import AgentSocket, socket_address, socket_path

WAIT_S = 20.0
FOLDER = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
CONNECT = Connect(conn_id="a->b", link="l-1", key="0" * 64, offers={}, wants=["tcp"])


def written(fd: int) -> bytes:
    return os.pread(fd, 100, 0)


class Far:
    """The peer-agent's end: what came is looked at by the test, frame by frame."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        with socket_address(path) as address:
            self.listener.bind(address)
        self.listener.listen()
        self.listener.settimeout(WAIT_S)
        self.sock: socket.socket | None = None
        self._come: list[Said] = []
        self._splitter = Splitter()

    def take(self) -> Frame:
        """Takes the next connection; its first frame."""
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(WAIT_S)
        self._splitter = Splitter()
        return self.heard().frame

    def welcome(self, alias: str = "a", instance: str = "i-1") -> Frame:
        """Takes the next connection, and the process with it."""
        hello = self.take()
        peer = Peer(alias=alias, registered_at=0.0, seen_at=0.0, revision=1)
        self.answer(hello, Welcome(alias=alias, scope="", instance=instance, node_id="n1", bus="nats://x", peer=peer))
        return hello

    def heard(self) -> Said:
        assert self.sock is not None
        while not self._come:
            data, fds = receive(self.sock)
            assert data, "the process closed the connection"
            self._come += [said for said in self._splitter.feed(data, fds) if isinstance(said, Said)]
        return self._come.pop(0)

    def ended(self) -> bool:
        """Whether the process has closed the connection; waits for it."""
        assert self.sock is not None
        return receive(self.sock)[0] == b""

    def answer(self, to: Frame, answer: Answer, fds: list[int] | None = None) -> None:
        self.say(Frame(id=to.id, answer=answer), fds)

    def say(self, frame: Frame, fds: list[int] | None = None) -> None:
        assert self.sock is not None
        outbox = Outbox()
        outbox.put(frame, fds or [])
        assert outbox.flush(self.sock)

    def drop(self) -> None:
        """Closes the connection, as a peer-agent that was killed."""
        assert self.sock is not None
        self.sock.close()
        self._splitter.close()
        self.sock = None

    def close(self) -> None:
        if self.sock is not None:
            self.drop()
        self.listener.close()


@pytest.fixture(autouse=True)
def no_leak() -> Generator[None]:
    """No descriptor is left open by a test."""
    before = len(list(FOLDER.iterdir()))
    yield
    assert len(list(FOLDER.iterdir())) == before


@pytest.fixture
def far(tmp_path: Path) -> Generator[Far]:
    end = Far(tmp_path / "agent.sock")
    yield end
    end.close()


Start = Callable[..., AgentSocket]


@pytest.fixture
def start(far: Far) -> Generator[Start]:
    """Begins a socket that is welcomed, and closes it after the test."""
    begun: list[AgentSocket] = []

    def begin(
        on_told: Callable[[Told], Answer | Refused | None] = lambda _: None,
        on_closed: Callable[[str], None] = lambda _: None,
    ) -> AgentSocket:
        taking = threading.Thread(target=far.welcome)
        taking.start()
        end = AgentSocket(far.path, Hello(), on_told=on_told, on_closed=on_closed, timeout_s=WAIT_S)
        taking.join()
        begun.append(end)
        return end

    yield begin
    for end in begun:
        end.close()


class Asking:
    """A question that is asked in a thread, since the test has to answer it."""

    def __init__(self, ask: Callable[[], tuple[Answer, tuple[int, ...]]]) -> None:
        self._ask = ask
        self._ended: queue.SimpleQueue[tuple[Answer, tuple[int, ...]] | PeerError] = queue.SimpleQueue()
        threading.Thread(target=self._run).start()

    def _run(self) -> None:
        try:
            self._ended.put(self._ask())
        except PeerError as error:
            self._ended.put(error)

    def end(self) -> tuple[Answer, tuple[int, ...]]:
        outcome = self._ended.get(timeout=WAIT_S)
        if isinstance(outcome, PeerError):
            raise outcome
        return outcome


def test_a_question_gets_its_own_answer_whatever_the_order(far: Far, start: Start) -> None:
    """Two are asked at once, and answered the other way round."""
    end = start()
    one = Asking(lambda: end.ask(ListPeers()))
    first = far.heard().frame
    two = Asking(lambda: end.ask(ListPeers()))
    second = far.heard().frame
    far.answer(second, Aliases(aliases=["second"]))
    far.answer(first, Aliases(aliases=["first"]))
    assert (one.end()[0], two.end()[0]) == (Aliases(aliases=["first"]), Aliases(aliases=["second"]))


def test_descriptors_go_and_come(far: Far, start: Start) -> None:
    """What was sent is a copy, and what comes is the caller's."""
    end = start()
    with tempfile.TemporaryFile() as mine, tempfile.TemporaryFile() as theirs:
        mine.write(b"mine")
        mine.flush()
        theirs.write(b"theirs")
        theirs.flush()
        put = Asking(lambda: end.ask(PutRegion(name="kv", length=4, epoch=1, fds=1), [mine.fileno()]))
        said = far.heard()
        assert [written(fd) for fd in said.fds] == [b"mine"]
        close_fds(said.fds)
        far.answer(said.frame, Done())
        assert put.end() == (Done(), ())
        call = Asking(lambda: end.ask(Call(peer="b", body=Resolve(link="l-1", names=["kv"]))))
        region = Region(name="kv", epoch=1, length=4, tokens={"shm": {}})
        answer = Called(body=RegionsResolved(regions=[region], fds=["kv"]), same_host=True)
        far.answer(far.heard().frame, answer, [theirs.fileno()])
        got, fds = call.end()
        assert got == answer
        assert [written(fd) for fd in fds] == [b"theirs"]
        close_fds(fds)


def test_a_refusal_is_an_error_with_its_code_and_its_field(far: Far, start: Start) -> None:
    """Of the first question as well as of later ones."""
    end = start()
    asking = Asking(lambda: end.ask(ListPeers()))
    far.say(Frame(id=far.heard().frame.id, refused=Refused(code="bad_message", reason="no", field="ask.kind")))
    with pytest.raises(PeerError, match=r"^kind: no$") as raised:
        asking.end()
    assert raised.value.code == "bad_message"


def test_a_process_that_is_not_taken_hears_why(far: Far) -> None:
    """The constructor raises, and leaves neither thread nor descriptor."""
    threads = threading.active_count()

    def refuse() -> None:
        hello = far.take()
        far.say(Frame(id=hello.id, refused=Refused(code="alias_taken", reason="another one is a", status=409)))

    taking = threading.Thread(target=refuse)
    taking.start()
    with pytest.raises(PeerError, match="another one is a") as raised:
        AgentSocket(far.path, Hello(alias="a"), on_told=lambda _: None, timeout_s=WAIT_S)
    taking.join()
    assert raised.value.code == "alias_taken"
    assert threading.active_count() == threads


def test_without_a_peer_agent_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    """It names the socket, the commands and the variable."""
    with pytest.raises(PeerError, match=r"agent\.sock .*`computemesh up`.*`computemesh join`.*COMPUTEMESH_HOME"):
        AgentSocket(tmp_path / "agent.sock", Hello(), on_told=lambda _: None)


def test_a_peer_agent_that_does_not_answer_is_given_up_in_time(far: Far, start: Start) -> None:
    """At hello, and at a question; an answer that comes later has its descriptors closed."""
    with pytest.raises(PeerError, match="did not answer") as raised:
        AgentSocket(far.path, Hello(), on_told=lambda _: None, timeout_s=0.05)
    assert raised.value.code == "unavailable"
    far.take()
    far.drop()
    end = start()
    with pytest.raises(PeerError, match=r"did not answer within 0\.05 s"):
        end.ask(Call(peer="b", body=Resolve(link="l-1", names=["kv"])), timeout_s=0.05)
    late = far.heard().frame
    with tempfile.TemporaryFile() as file:
        answer = Called(body=RegionsResolved(regions=[], fds=["kv"]))
        far.answer(late, answer, [file.fileno()])
    asking = Asking(lambda: end.ask(ListPeers()))
    far.answer(far.heard().frame, Aliases(aliases=[]))
    asking.end()


def test_what_the_peer_agent_asks_is_answered_and_what_it_tells_is_heard_in_its_order(far: Far, start: Start) -> None:
    """Questions are answered at once, also while another one takes its time; a defect is a refusal."""
    slow = threading.Event()
    told: queue.SimpleQueue[Told] = queue.SimpleQueue()

    def on_told(said: Told) -> Answer | Refused | None:
        match said:
            case Accept(peer="slow"):
                slow.wait(WAIT_S)
                return Accepted(body=Connected(link=said.body.link, answers={}))
            case Accept(peer="never"):
                return Refused(code="refused", reason="not you", status=403)
            case Accept(peer="error"):
                raise PeerError("crossed", "I was first")
            case Accept():
                raise ZeroDivisionError("a defect")
            case _:
                told.put(said)
                return None

    start(on_told)
    for number, peer in enumerate(["slow", "never", "error", "defect"], 1):
        far.say(Frame(id=number, ask=Accept(peer=peer, node_id="n1", same_host=True, body=CONNECT)))
    answers = {frame.id: frame for frame in (far.heard().frame for _ in range(3))}
    assert {number: frame.refused and frame.refused.code for number, frame in answers.items()} == {
        2: "refused",
        3: "crossed",
        4: "failed",
    }
    losses = [Lost(peer="b", link=f"l-{number}") for number in range(50)]
    for lost in losses:
        far.say(Frame(ask=lost))
    assert [told.get(timeout=WAIT_S) for _ in losses] == losses
    slow.set()
    assert far.heard().frame == Frame(id=1, answer=Accepted(body=Connected(link="l-1", answers={})))


def test_an_order_is_begun_and_its_end_is_told(far: Far, start: Start) -> None:
    """The end has no answer."""
    transfer = Transfer(transfer_id="t-1", alias="a", peer="b", kind="read", pieces=[Piece(local="kv", length=1)])
    begun = Begun(body=TransferBegun(transfer_id="t-1", state="running"))

    def on_told(told: Told) -> Answer | Refused | None:
        return begun if isinstance(told, Order) else None

    end = start(on_told)
    far.say(Frame(id=9, ask=Order(transfer=transfer)))
    assert far.heard().frame == Frame(id=9, answer=begun)
    ended = Ended(
        outcome=Transferred(transfer_id="t-1", node_id="n1", alias="a", peer="b", kind="read", ok=True, at=1.0)
    )
    end.tell(ended)
    assert far.heard().frame == Frame(ask=ended)


def test_an_end_that_cannot_be_told_is_told_when_the_peer_agent_is_back(far: Far, start: Start) -> None:
    """Whoever ordered the transfer waits for it."""
    end = start()
    far.drop()
    ended = [
        Ended(
            outcome=Transferred(transfer_id=f"t-{n}", node_id="n1", alias="a", peer="b", kind="read", ok=True, at=1.0)
        )
        for n in range(3)
    ]
    for one in ended:
        end.tell(one)
    far.welcome()
    assert [far.heard().frame for _ in ended] == [Frame(ask=one) for one in ended]


def test_what_cannot_be_read_is_refused_and_the_connection_goes_on(far: Far, start: Start) -> None:
    """An unknown question, one that is not a process's to answer, and an answer that is none."""
    end = start()
    assert far.sock is not None
    body = b'{"id":3,"ask":{"kind":"dance"}}'
    far.sock.sendall(len(body).to_bytes(4, "big") + body)
    refusal = far.heard().frame
    assert refusal.refused is not None
    assert (refusal.id, refusal.refused.field) == (3, "ask.kind")
    far.say(Frame(id=4, ask=ListPeers()))
    refusal = far.heard().frame
    assert refusal.refused is not None
    assert (refusal.id, refusal.refused.reason) == (4, "a process is not asked this")
    asking = Asking(lambda: end.ask(ListPeers()))
    number = far.heard().frame.id
    body = b'{"id":%d,"answer":{"kind":"aliases","aliases":3}}' % number
    far.sock.sendall(len(body).to_bytes(4, "big") + body)
    with pytest.raises(PeerError, match=r"answer\.aliases: Expected 'array'"):
        asking.end()


def test_when_the_peer_agent_comes_back_the_process_is_who_it_was(far: Far, start: Start) -> None:
    """It says its alias, its instance and its links, and puts again what it had put and not dropped."""
    accepted = threading.Event()

    def on_told(told: Told) -> Answer | Refused | None:
        if isinstance(told, Accept):
            accepted.set()
            return Accepted(body=Connected(link=told.body.link, answers={}))
        return None

    end = start(on_told)
    with tempfile.TemporaryFile() as page, tempfile.TemporaryFile() as memory:
        page.write(b"page")
        page.flush()
        memory.write(b"memory")
        memory.flush()
        puts: list[tuple[PutEpochs | PutRegion | DropRegion, list[int]]] = [
            (PutEpochs(), [page.fileno()]),
            (PutRegion(name="gone", length=1, epoch=1), []),
            (PutRegion(name="kv", length=4, epoch=2), []),
            (PutRegion(name="kv", length=4, epoch=3, fds=1), [memory.fileno()]),
            (DropRegion(name="gone", epoch=1), []),
            (DropRegion(name="kv", epoch=2), []),
        ]
        for question, fds in puts:
            asking = Asking(lambda question=question, fds=fds: end.ask(question, fds))  # type: ignore[misc]
            said = far.heard()
            close_fds(said.fds)
            far.answer(said.frame, Done())
            asking.end()
    for link, peer in (("l-1", "b"), ("l-2", "c")):
        call = Asking(
            lambda link=link, peer=peer: end.ask(  # type: ignore[misc]
                Call(peer=peer, body=Connect(conn_id="x", link=link, key="0" * 64, offers={}, wants=[]))
            )
        )
        far.answer(far.heard().frame, Called(body=Connected(link=link, answers={})))
        call.end()
    accept = Accept(
        peer="d",
        node_id="n2",
        same_host=False,
        body=Connect(conn_id="x", link="l-3", key="0" * 64, offers={}, wants=[]),
    )
    far.say(Frame(id=1, ask=accept))
    assert far.heard().frame.answer is not None
    far.say(Frame(ask=Lost(peer="c")))
    asking = Asking(lambda: end.ask(ListPeers()))  # Asked behind it, so it is heard.
    far.heard()
    far.drop()
    hello = far.welcome()
    assert isinstance(hello.ask, Hello)
    assert (hello.ask.alias, hello.ask.instance, hello.ask.links) == ("a", "i-1", {"l-1": "b", "l-3": "d"})
    epochs, region, again = far.heard(), far.heard(), far.heard()
    assert (epochs.frame.ask, [written(fd) for fd in epochs.fds]) == (PutEpochs(), [b"page"])
    assert region.frame.ask == PutRegion(name="kv", length=4, epoch=3, fds=1)
    assert [written(fd) for fd in region.fds] == [b"memory"]
    close_fds(epochs.fds + region.fds)
    assert again.frame.ask == ListPeers(), "what was asked, and may be asked twice, is asked again"
    far.answer(again.frame, Aliases(aliases=["a"]))
    assert asking.end()[0] == Aliases(aliases=["a"])


def test_a_region_that_was_refused_is_not_said_again_but_the_one_before_it_is(far: Far, start: Start) -> None:
    end = start()
    before = len(list(FOLDER.iterdir()))
    first, second, other = (
        PutRegion(name=name, length=1, epoch=epoch) for name, epoch in [("kv", 1), ("kv", 2), ("x", 3)]
    )
    asking = Asking(lambda: end.ask(first))
    far.answer(far.heard().frame, Done())
    asking.end()
    for refused in (second, other):
        asking = Asking(partial(end.ask, refused))
        far.say(Frame(id=far.heard().frame.id, refused=Refused(code="full", reason="no room", status=503)))
        with pytest.raises(PeerError):
            asking.end()
    far.drop()
    far.welcome()
    assert far.heard().frame.ask == first
    asking = Asking(lambda: end.ask(ListPeers()))
    frame = far.heard().frame
    assert frame.ask == ListPeers()
    far.answer(frame, Aliases(aliases=[]))
    asking.end()
    assert len(list(FOLDER.iterdir())) == before


def test_a_call_is_not_made_twice_when_the_peer_agent_goes_away(far: Far, start: Start) -> None:
    """Whether the peer heard of it is not known."""
    end = start()
    asking = Asking(lambda: end.ask(Call(peer="b", body=CONNECT)))
    far.heard()
    far.drop()
    with pytest.raises(PeerError, match="went away") as raised:
        asking.end()
    assert raised.value.code == "unavailable"


def test_where_regions_are_is_asked_again_when_the_peer_agent_comes_back(far: Far, start: Start) -> None:
    end = start()
    call = Call(peer="b", body=Resolve(link="l-1", names=["kv"]))
    asking = Asking(lambda: end.ask(call))
    far.heard()
    far.drop()
    far.welcome()
    again = far.heard()
    assert again.frame.ask == call
    far.answer(again.frame, Aliases(aliases=[]))
    asking.end()


def test_a_process_that_is_not_taken_back_is_told_so_once(far: Far, start: Start) -> None:
    """After that nothing can be asked any more."""
    closed: queue.SimpleQueue[str] = queue.SimpleQueue()
    end = start(on_closed=closed.put)
    far.drop()
    hello = far.take()
    far.say(Frame(id=hello.id, refused=Refused(code="alias_taken", reason="another one is a", status=409)))
    assert "another one is a" in closed.get(timeout=WAIT_S)
    with pytest.raises(PeerError, match="does not take this process back") as raised:
        end.ask(ListPeers())
    assert raised.value.code == "closed"
    assert closed.empty()


def test_a_peer_agent_that_is_not_ready_is_asked_again(far: Far, start: Start) -> None:
    """While the control plane is away it takes nobody; that is no reason to give up."""
    end = start()
    far.drop()
    hello = far.take()
    far.say(Frame(id=hello.id, refused=Refused(code="unavailable", reason="not yet", status=503, retry="later")))
    far.drop()
    far.welcome()
    asking = Asking(lambda: end.ask(ListPeers()))
    far.answer(far.heard().frame, Aliases(aliases=[]))
    asking.end()


def test_closing_ends_the_peer_and_whatever_waits(far: Far, start: Start) -> None:
    """Twice is fine; the threads are gone, and nobody is told of a loss."""
    threads = threading.active_count()
    closed: list[str] = []
    end = start(on_closed=closed.append)
    asking = Asking(lambda: end.ask(Call(peer="b", body=CONNECT)))
    far.heard()
    end.close()
    end.close()
    assert far.ended()
    with pytest.raises(PeerError):
        asking.end()
    with pytest.raises(PeerError) as raised:
        end.ask(ListPeers())
    assert raised.value.code == "closed"
    assert closed == []
    assert threading.active_count() == threads


FORKS = """
import os, signal, sys, time
from pathlib import Path
from computemesh.peer.signals import Hello
from computemesh.peer.socket import AgentSocket

end = AgentSocket(Path(sys.argv[1]), Hello(alias="a"), on_told=lambda told: None)
child = os.fork()
if child:
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_a_process_that_is_killed_is_gone_though_a_child_of_it_lives(far: Far) -> None:
    with subprocess.Popen([sys.executable, "-c", FORKS, far.path], stdout=subprocess.PIPE) as process:
        far.welcome()
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            assert far.ended()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_socket_in_a_deep_folder_can_be_reached(tmp_path: Path) -> None:
    """The system takes 107 bytes of an address; a home may lie deeper."""
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    far = Far(deep / "agent.sock")
    taking = threading.Thread(target=far.welcome)
    taking.start()
    AgentSocket(far.path, Hello(), on_told=lambda _: None, timeout_s=WAIT_S).close()
    taking.join()
    far.close()


def test_the_socket_is_named_by_the_environment_or_lies_in_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The variable of its own counts before the home's."""
    monkeypatch.delenv("COMPUTEMESH_PEER_SOCKET", raising=False)
    monkeypatch.setenv("COMPUTEMESH_HOME", str(tmp_path))
    assert socket_path() == Path(os.path.realpath(tmp_path)) / "run" / "peer-agent.sock"
    monkeypatch.setenv("COMPUTEMESH_PEER_SOCKET", "/elsewhere.sock")
    assert socket_path() == Path("/elsewhere.sock")


def test_bytes_of_a_frame_are_four_of_its_length_and_its_json() -> None:
    """So a program in any language can speak it."""
    assert pack(Frame(id=7, ask=ListPeers())) == b'\0\0\0\x24{"id":7,"ask":{"kind":"list_peers"}}'
