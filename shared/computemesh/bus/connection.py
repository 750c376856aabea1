"""The connection to NATS, and the four things one does with it: publish, store, subscribe, ask."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
from nats.aio.client import Server
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from computemesh import log, trace
from computemesh.addresses import login_of, servers_of, without_login
from computemesh.bus.client import LeanClient
from computemesh.bus.errors import BusError, Conflict, NoResponder, NotAdmitted, NotStored, TimedOut, Unreachable
from computemesh.contracts.base import Event, Message, Refused, Request, Role, decode, encode
from computemesh.contracts.permissions import Identity, identity, inbox_prefix, is_inbox

ASK_TIMEOUT_S: Final = 5.0
"""How long :meth:`Bus.ask` waits unless told otherwise."""

INQUIRE_S: Final = (1.0, 1.0, 1.0, 1.0, 5.0)
"""How long :func:`inquire` waits before it asks again, and the last time."""

FLUSH_S_MAX: Final = 86_400
"""How long a flush may be answered after nobody waits for it any more; a connection that is silent breaks before."""

INITIAL_RETRY_S: Final = 0.2
"""Pause between attempts to reach a server that was never reached yet."""

RECONNECT_DELAY_S_MAX: Final = 2.0
"""Bound on the pause between two attempts to reach the server again."""

PENDING_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bound on what is buffered while the connection is down; above it publishing raises."""

WRONG_LAST_SEQUENCE: Final = frozenset({10071, 10164})
"""Server codes of a lost compare-and-set; replicated streams answer with the second."""

_BROKE: Final = "the connection broke before the answer came"

M = TypeVar("M", bound=Message)
Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
T = TypeVar("T")

_log = log.get("bus")


class ApiError(msgspec.Struct, frozen=True, kw_only=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(msgspec.Struct, frozen=True, kw_only=True):
    """JetStream's answer to a publish: stored under *seq*, or not because of *error*."""

    seq: int = 0
    duplicate: bool = False
    error: ApiError | None = None


_decode_ack = msgspec.json.Decoder(PubAck).decode


def read_ack(subject: str, data: bytes) -> PubAck:
    """The acknowledgement in *data*.

    Raises:
        Conflict: a compare-and-set was lost.
        NotStored: any other refusal of the server.
    """
    ack = _decode_ack(data)
    if ack.error is None:
        return ack
    text = f"{subject}: {ack.error.description} ({ack.error.err_code})"
    if ack.error.err_code in WRONG_LAST_SEQUENCE:
        raise Conflict(text)
    raise NotStored(text, code=ack.error.err_code)


@dataclass(frozen=True, kw_only=True)
class Where:
    """How to reach the bus, and as whom."""

    url: str
    """One server, or several of one cluster, separated by commas."""
    role: Role
    name: str
    """Shown by the server beside the connection."""

    @property
    def shown(self) -> str:
        """The address without its credentials, for messages."""
        return without_login(self.url)

    @property
    def user(self) -> str:
        return login_of(self.url).partition(":")[0]

    @property
    def inbox_prefix(self) -> str:
        """Where replies are received: the credentials decide what may be heard, hence this."""
        who = identity(self.user) or Identity(self.role)
        return inbox_prefix(who.role, who.node_id)


class Bus:
    """One connection, kept alive: it reconnects for ever, with jitter, and tells those who must resync.

    Args:
        on_defect: takes what a message handler raised.
        on_denied: takes the server's words when it denies a subject; left out, they are logged.
    """

    def __init__(
        self,
        where: Where,
        *,
        on_defect: Callable[[BaseException], None] | None = None,
        on_denied: Callable[[str], None] | None = None,
    ) -> None:
        self.where: Final = where
        self.interrupted = asyncio.Event()
        """Set when the connection breaks; a fresh event stands here after each reconnect."""
        self.connected = asyncio.Event()
        self.max_payload = 1024 * 1024
        self._nc = LeanClient()
        self._on_defect = on_defect or _log_defect
        self._on_denied = on_denied
        self._last_error: BaseException | None = None
        self._refused = asyncio.Event()
        self._wait_for_server = True
        self._closing = False
        self._asked: set[asyncio.Task[Any]] = set()
        """What waits for the server to answer."""
        self._lost = False
        """There was a connection, and it broke."""

    # --- connection --------------------------------------------------------------------------------------

    async def connect(self, *, timeout_s: float | None = None, wait_for_server: bool = True) -> None:
        """Connects, waiting for a server that is not there yet.

        Args:
            timeout_s: give up after that long, or as soon as the credentials are refused; None waits for ever,
                saying so in the log.
            wait_for_server: with a timeout, False also gives up as soon as nothing listens there.

        Raises:
            Unreachable: no server in time.
            NotAdmitted: it refuses the credentials.
        """
        self._wait_for_server = wait_for_server
        user, _, password = login_of(self.where.url).partition(":")
        attempt = asyncio.ensure_future(
            self._nc.connect(
                servers=servers_of(self.where.url),
                # For servers that the cluster tells of too; by itself nats-py takes the login out of each address.
                user=user if password else None,
                password=password or None,
                name=self.where.name,
                inbox_prefix=self.where.inbox_prefix,
                connect_timeout=2,
                max_reconnect_attempts=-1,
                reconnect_time_wait=INITIAL_RETRY_S,  # type: ignore[arg-type]  # any number will do
                reconnect_to_server_handler=_next_server,
                ping_interval=10,
                max_outstanding_pings=2,
                pending_size=PENDING_BYTES_MAX,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                reconnected_cb=self._on_reconnect,
            )
        )
        waited_s = 0.0
        refused = asyncio.ensure_future(self._refused.wait())
        try:
            while True:
                step_s = 5.0 if timeout_s is None else timeout_s
                watched = {attempt} if timeout_s is None else {attempt, refused}
                await asyncio.wait(watched, timeout=step_s, return_when=asyncio.FIRST_COMPLETED)
                waited_s += step_s
                if attempt.done():
                    break
                if timeout_s is not None:
                    attempt.cancel()
                    await asyncio.wait({attempt})
                    raise self._unreachable()
                _log.warning("waiting for NATS", url=self.where.shown, waited_s=waited_s, reason=self._reason())
        finally:
            refused.cancel()
        try:
            attempt.result()
        except (nats.errors.Error, OSError) as error:
            self._last_error = error
            raise self._unreachable() from error
        self.max_payload = self._nc.max_payload
        self.connected.set()

    def _unreachable(self) -> Unreachable:
        if self._last_error is not None and _is_refusal(self._last_error):
            return NotAdmitted(f"the NATS server at {self.where.shown} refuses the credentials: {self._last_error}")
        return Unreachable(f"no NATS server at {self.where.shown}: {self._reason()}")

    def _reason(self) -> str:
        return str(self._last_error or "") or "no answer"

    async def _on_error(self, error: Exception) -> None:
        # A refusal says more than the reset that follows it, and stays until there is a connection.
        if self._last_error is None or not _is_refusal(self._last_error):
            self._last_error = error
            if self._lost and _is_refusal(error):
                _log.error("NATS refuses our credentials", url=self.where.shown)
        if _is_refusal(error) or (isinstance(error, OSError) and not self._wait_for_server):
            self._refused.set()
        if isinstance(error, nats.errors.Error) and "permissions violation" in str(error).lower():
            if self._on_denied is not None:
                self._on_denied(str(error).removeprefix("nats: "))
            else:
                _log.error("not permitted", role=str(self.where.role), reason=str(error))

    async def _on_disconnect(self) -> None:
        if self.connected.is_set() and not self._closing:
            _log.warning("NATS is gone, reconnecting", url=self.where.shown)
            self._lost = True
        self.connected.clear()
        self.interrupted.set()
        for task in self._asked:
            task.cancel(_BROKE)

    async def _on_reconnect(self) -> None:
        _log.info("NATS is back", url=self.where.shown)
        self.interrupted = asyncio.Event()
        self._last_error = None
        self._lost = False
        self.connected.set()

    @property
    def up(self) -> bool:
        return self._nc.is_connected

    @property
    def stats(self) -> Mapping[str, int]:
        """Messages and bytes in both directions, reconnects and errors, since the start."""
        return self._nc.stats

    async def flush(self) -> None:
        """Returns once the server has processed all that was sent so far."""
        try:
            # The first PING of nats-py may overtake commands that are still buffered; the second cannot.
            for _ in range(2):
                await self._flush_once()
        except TimeoutError:
            raise TimedOut(f"flush: no answer in {ASK_TIMEOUT_S:g} s") from None
        except (nats.errors.Error, OSError) as error:
            raise TimedOut(f"flush: {error}") from error

    async def _flush_once(self) -> None:
        # Given up inside nats-py, by a timeout or by being cancelled, a flush ends its reader with an error as soon as
        # the answer comes. So it goes on until then, or until the connection breaks, and only we stop waiting for it.
        flushing = asyncio.ensure_future(self._answered("flush", self._nc.flush(timeout=FLUSH_S_MAX)))
        flushing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait_for(asyncio.shield(flushing), ASK_TIMEOUT_S)

    async def close(self) -> None:
        """Sends what is buffered and closes. Safe to call twice, and when the server is gone."""
        self._closing = True
        with contextlib.suppress(nats.errors.Error, OSError, BusError, TimeoutError):
            if self._nc.is_connected:
                await self.flush()
        # nats-py asserts that it got as far as opening a connection.
        with contextlib.suppress(nats.errors.Error, OSError, AssertionError):
            await self._nc.close()

    # --- raw, for the other modules of this package ---------------------------------------------------------

    def new_inbox(self) -> str:
        return self._nc.new_inbox()

    async def send(self, subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Publishes bytes.

        Raises:
            Unreachable: the connection is down and its buffer full, or closed.
            NotStored: larger than the server takes.
        """
        try:
            await self._nc.publish(subject, data, reply=reply, headers=headers)
        except nats.errors.MaxPayloadError as error:
            raise NotStored(f"{subject}: {len(data)} bytes, the server takes {self.max_payload}") from error
        except (nats.errors.Error, OSError) as error:
            raise Unreachable(f"{subject}: {error}") from error

    async def respond(self, message: Msg, data: bytes, *, headers: dict[str, str] | None = None) -> None:
        """Answers a request, but only into an inbox.

        A server without accounts checks what a client publishes, not where it wants the answer: without
        this, a caller could have us write on its behalf where it may not, into a bucket for example.
        """
        if not is_inbox(message.reply):
            if message.reply:
                _log.warning(
                    "not answered: the reply subject is no inbox", subject=message.subject, reply=message.reply
                )
            return
        await self.send(message.reply, data, headers=headers)

    async def call(
        self, subject: str, data: bytes, *, timeout_s: float = ASK_TIMEOUT_S, headers: dict[str, str] | None = None
    ) -> Msg:
        """One request, one raw reply.

        Raises:
            NoResponder, TimedOut, Unreachable, NotStored. TimedOut also at once when the connection breaks,
            since no reply comes to one that is gone.
        """
        if len(data) > self.max_payload:
            raise NotStored(f"{subject}: {len(data)} bytes, the server takes {self.max_payload}")
        try:
            return await self._answered(subject, self._request(subject, data, timeout_s, traced(headers)))
        except nats.errors.NoRespondersError as error:
            raise NoResponder(f"{subject}: nobody answers there now") from error
        except (nats.errors.TimeoutError, TimeoutError) as error:
            raise TimedOut(f"{subject}: no answer in {timeout_s:g} s") from error
        except (nats.errors.Error, OSError) as error:
            raise Unreachable(f"{subject}: {error}") from error

    async def _request(self, subject: str, data: bytes, timeout_s: float, headers: dict[str, str] | None) -> Msg:
        # While the connection is down nats-py keeps what is published for the next one. A request would then be
        # served when nobody waits for its answer any more, and perhaps after it was made again.
        if not self.connected.is_set() and not self._closing:
            began_s = asyncio.get_running_loop().time()
            await asyncio.wait_for(self.connected.wait(), timeout_s)
            timeout_s = max(0.0, timeout_s - (asyncio.get_running_loop().time() - began_s))
        return await self._nc.request(subject, data, timeout=timeout_s, headers=headers)

    async def _answered(self, what: str, asking: Coroutine[Any, Any, T]) -> T:
        """The server's answer; nats-py would wait for it out its time, also when the connection broke.

        Raises:
            TimedOut: the connection broke.
        """
        if self._nc.reading:
            asking.close()
            raise RuntimeError(f"{what}: an inline handler cannot wait for an answer")
        task = asyncio.create_task(asking)
        self._asked.add(task)
        try:
            return await task
        except asyncio.CancelledError as error:
            if error.args != (_BROKE,):
                raise
            raise TimedOut(f"{what}: {_BROKE}") from None
        finally:
            self._asked.discard(task)

    async def listen(
        self, subject: str, on_message: Callable[[Msg], Awaitable[None]], *, queue: str = "", inline: bool = False
    ) -> Subscription:
        """Subscribes raw. An exception in *on_message* is a defect of the program, and reported as one.

        Args:
            inline: it runs as the message is read, which is fast, and holds up all that comes after. So it may send,
                but not wait for an answer: that raises RuntimeError.
        """

        async def guarded(message: Msg) -> None:
            try:
                await on_message(message)
            except Exception as error:
                self._on_defect(error)

        if inline:
            return await self._nc.subscribe_inline(subject, guarded, queue=queue)
        return await self._nc.subscribe(subject, queue=queue, cb=guarded)  # pyright: ignore[reportUnknownMemberType]

    async def forget(self, subscription: Subscription) -> None:
        """Unsubscribes; what was delivered but not handled is dropped."""
        with contextlib.suppress(nats.errors.Error, OSError):
            await subscription.unsubscribe()

    async def drain(self, subscription: Subscription) -> None:
        """Unsubscribes after handling what was delivered; while the connection is down, at once."""
        if not self.connected.is_set():
            await self.forget(subscription)
            return
        try:
            await self._answered("drain", subscription.drain())  # type: ignore[no-untyped-call]
        except (nats.errors.Error, OSError, TimeoutError, BusError):
            # nats-py leaves it half closed: it would be subscribed again with the next connection.
            subscription._stop_processing()  # pyright: ignore[reportPrivateUsage]
            self._nc._remove_sub(subscription._id)  # pyright: ignore[reportPrivateUsage]

    async def caught_up(self, subscription: Subscription, *, within_s: float) -> bool:
        """Whether all that the server had for *subscription* by now is handled, or is so within that time.

        Raises:
            TimedOut: the server does not answer.
        """
        await self.flush()
        arrived = subscription.delivered
        deadline_s = asyncio.get_running_loop().time() + within_s
        # One more may be in hand than what no longer waits.
        while subscription.delivered - subscription.pending_msgs < arrived:
            if asyncio.get_running_loop().time() >= deadline_s:
                return False
            await asyncio.sleep(0.005)
        return True

    # --- contracts -----------------------------------------------------------------------------------------

    async def publish(self, event: Event[M], payload: M, *, target: str = "") -> None:
        """Publishes an event, at most once."""
        await self.send(event.at(target), encode(payload), headers=traced(None))

    async def store(
        self,
        event: Event[M],
        payload: M,
        *,
        message_id: str = "",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> int:
        """Publishes a captured event and waits until it is stored.

        Args:
            message_id: the server drops a second message with this id within its duplicate window.

        Returns:
            The sequence under which it stands.
        """
        assert event.captured, f"{event.subject} is not captured"
        sent = dict(headers or {})
        if message_id:
            sent["Nats-Msg-Id"] = message_id
        subject = event.at()
        reply = await self.call(subject, encode(payload), timeout_s=timeout_s, headers=sent or None)
        return read_ack(subject, reply.data).seq

    async def subscribe(
        self,
        event: Event[M],
        handler: Callable[[M], Awaitable[None]],
        *,
        target: str = "",
        queue: str = "",
        garbled: Callable[[bytes, Refused], Awaitable[None]] | None = None,
    ) -> Subscription:
        """Hears an event, one message at a time and in order. What does not decode is logged, shown to *garbled*,
        and skipped."""
        subject = event.at(target or ("*" if event.target else ""))

        async def on_message(message: Msg) -> None:
            payload = decode(message.data, event.payload)
            if isinstance(payload, Refused):
                _log.warning("ignored a message", subject=message.subject, reason=payload.reason, field=payload.field)
                if garbled is not None:
                    await garbled(message.data, payload)
                return
            with trace.within(sender_of(message.headers)):
                await handler(payload)

        return await self.listen(subject, on_message, queue=queue)

    async def ask(
        self, request: Request[Q, R], question: Q, *, target: str = "", timeout_s: float = ASK_TIMEOUT_S
    ) -> R | Refused:
        """Asks and gives the answer or the refusal.

        Raises:
            NoResponder, TimedOut, Unreachable: nobody could be asked.
        """
        reply = await self.call(request.at(target), encode(question), timeout_s=timeout_s)
        return read_answer(request, reply.data, reply.headers)


async def inquire(bus: Bus, subject: str, data: bytes) -> Msg:
    """A request to JetStream that may be made twice, and its raw reply.

    While the servers of a cluster choose a leader nobody answers, not even to say so; hence it is asked again.

    Raises:
        NoResponder, TimedOut, Unreachable, NotStored: as :meth:`Bus.call`.
    """
    for timeout_s in INQUIRE_S[:-1]:
        with contextlib.suppress(TimedOut):
            return await bus.call(subject, data, timeout_s=timeout_s)
        if bus.interrupted.is_set():
            break
    return await bus.call(subject, data, timeout_s=INQUIRE_S[-1])


def read_answer(request: Request[Q, R], data: bytes, headers: Mapping[str, str] | None) -> R | Refused:
    """A reply as the request's reply type, or as the refusal it carries."""
    kind: type[Any] = Refused if headers and "Nats-Service-Error" in headers else request.gives
    answer: R | Refused = decode(data, kind)
    return answer


def sender_of(headers: Mapping[str, str] | None) -> str:
    """The trace context that a message came with; empty when it has none."""
    return headers.get(trace.HEADER, "") if headers else ""


def traced(headers: dict[str, str] | None) -> dict[str, str] | None:
    """*headers* with the trace that this code runs in, if it runs in one."""
    if here := trace.to_send():
        return {**headers, trace.HEADER: here} if headers else {trace.HEADER: here}
    return headers


def _log_defect(error: BaseException) -> None:
    _log.error("handler failed", exc_info=error)


def _is_refusal(error: BaseException) -> bool:
    return "authorization" in str(error).lower()


def _next_server(servers: list[Server], _info: dict[str, Any]) -> tuple[Server | None, float]:
    """Any of the servers that failed least, after a pause that grows with that. Jitter spreads a whole fleet."""
    least = min(server.reconnects for server in servers)
    chosen = random.choice([s for s in servers if s.reconnects == least])  # noqa: S311  # spreading load, not a secret
    ceiling_s = min(RECONNECT_DELAY_S_MAX, 0.1 * 2 ** min(chosen.reconnects, 8))
    return chosen, random.uniform(0.02, ceiling_s)  # noqa: S311
