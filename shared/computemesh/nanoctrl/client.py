"""The synchronous client."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError, ProtocolError

from computemesh.nanoctrl import calls
from computemesh.nanoctrl.calls import Call, Exchange, NanoCtrlError, Operations, log

T = TypeVar("T")

CONNECTIONS_KEPT: Final = 4
"""Threads that ask at the same time have a connection each; so many stay open."""


class NanoCtrlClient:
    """Registers an engine with a control plane, keeps it registered, and asks about others.

    What NanoCtrl's client of this name does, with the same methods and answers. Calls about engines do not raise when
    the control plane is away or refuses: that is logged, and the answer is False, None, an empty list or ``"error"``.
    Calls about peers raise :class:`NanoCtrlError` then.

    May be used by several threads, and on both sides of a fork. Connections are kept from one call to the next;
    proxies of the environment are not used.

    Args:
        address: of the control plane, ``host:port`` or ``http://host:port``.
        scope: that of all its calls; left out, the one without a name.
        token: of the control plane's edge, where it demands one; left out, ``COMPUTEMESH_TOKEN``.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, address: str, scope: str | None = None, *, token: str | None = None) -> None:
        self._place = calls.place(address, token)
        self._path = urlsplit(self._place.base).path
        self._operations = Operations(scope)
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._pool_of = 0
        self._beating: tuple[threading.Thread, threading.Event] | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Lock()

    @property
    def registered(self) -> bool:
        """Whether the engine is registered, by what the control plane said last."""
        return self._operations.registered

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    # --- engines -------------------------------------------------------------------------------------------------

    def check_connection(self) -> None:
        """Asks whether the control plane is there.

        Raises:
            RuntimeError: it is not, or cannot serve; the message says why.
        """
        self._do(self._operations.check(self._place))

    def register(self, engine_id: str, extra: Mapping[str, Any]) -> bool:
        """Registers an engine, and makes it the one of this client.

        Args:
            extra: what it is: ``role``, ``world_size``, ``num_blocks``, ``host``, ``port``, ``peer_addrs`` and so on.
        """
        return self._do(self._operations.register(engine_id, extra))

    def unregister(self) -> bool:
        """Takes the engine out of the control plane; False also when there was none."""
        return self._do(self._operations.unregister())

    def heartbeat(self) -> str:
        """Keeps the engine registered for another 60 s: ``"ok"``, ``"not_found"`` or ``"error"``."""
        return self._do(self._operations.heartbeat())

    def get_redis_url(self) -> str | None:
        """Where the bus is: ``nats://host:port`` of computemesh's control plane, ``redis://host:port`` of
        NanoCtrl's."""
        return self._do(self._operations.bus_url())

    def get_engine_info(self, engine_id: str) -> dict[str, Any] | None:
        """What is registered of an engine of this scope; None when it is not, or cannot be asked."""
        return self._do(self._operations.engine_info(engine_id))

    def list_engines(self) -> list[dict[str, Any]]:
        """The engines of this scope; none also when they cannot be asked for."""
        return self._do(self._operations.list_engines())

    # --- heartbeats ----------------------------------------------------------------------------------------------

    def start_heartbeat(
        self,
        interval: float = calls.INTERVAL_S,
        on_not_found: Callable[[], object] | None = None,
        name: str = calls.HEARTBEAT_NAME,
    ) -> None:
        """Sends heartbeats from a daemon thread, the first after one interval. While it runs, a second call does
        nothing.

        Args:
            interval: seconds from the end of one heartbeat to the next.
            on_not_found: called in that thread when the control plane does not know the engine: usually it registers
                it again.
            name: of the thread.

        Raises:
            ValueError: the interval is not above 0.
        """
        calls.check_interval(interval)
        with self._lock:
            if self._beating is not None and self._beating[0].is_alive() and not self._beating[1].is_set():
                return
            stop = threading.Event()
            thread = threading.Thread(target=self._beat, args=(interval, on_not_found, stop), name=name, daemon=True)
            self._beating = thread, stop
            thread.start()

    def _beat(self, interval_s: float, on_not_found: Callable[[], object] | None, stop: threading.Event) -> None:
        while not stop.wait(interval_s):
            # One that is being stopped is unknown because it was unregistered, and must not come back.
            if self.heartbeat() == "not_found" and on_not_found is not None and not stop.is_set():
                calls.tell_unknown(self._operations)
                try:
                    on_not_found()
                except Exception:
                    log.exception("on_not_found failed")

    def stop_heartbeat(self, timeout: float = calls.STOP_S) -> None:
        """Ends the heartbeats, and waits so many seconds for one that is under way."""
        with self._lock:
            beating = self._beating
        if beating is not None:
            thread, stop = beating
            stop.set()
            if thread is not threading.current_thread():  # on_not_found may stop the client.
                thread.join(timeout)

    def stop(self, timeout: float = calls.STOP_S) -> None:
        """Ends the heartbeats, unregisters the engine if it is registered, and gives up the connections. May be called
        any number of times; what is asked afterwards opens a connection again."""
        self.stop_heartbeat(timeout)
        with self._stopping:
            if self.registered:
                self.unregister()
        with self._lock:
            self._pool = None  # Its connections end with it, once no thread asks over them.

    # --- peers ---------------------------------------------------------------------------------------------------

    def register_peer(
        self, *, alias: str | None, device: str, ib_port: int, link_type: str, address: str, name_prefix: str
    ) -> dict[str, Any]:
        """Registers a peer agent; gives its ``name``, made from *name_prefix* where there is no alias, and
        ``redis_address``.

        Raises:
            NanoCtrlError: with ``status_code`` 409 when the alias is taken.
        """
        return self._do(
            self._operations.register_peer(
                alias=alias,
                device=device,
                ib_port=ib_port,
                link_type=link_type,
                address=address,
                name_prefix=name_prefix,
            )
        )

    def cleanup_peer(self, agent_name: str) -> dict[str, Any]:
        """Forgets a peer agent and all that is its own.

        Raises:
            NanoCtrlError: it could not be done.
        """
        return self._do(self._operations.cleanup_peer(agent_name))

    def heartbeat_peer(self, agent_name: str) -> dict[str, Any]:
        """Keeps a peer agent registered for another 60 s; ``status`` of the answer is ``ok`` or ``not_found``.

        Raises:
            NanoCtrlError: it could not be done.
        """
        return self._do(self._operations.heartbeat_peer(agent_name))

    def set_desired_topology(
        self, alias: str, *, target_peers: list[str], min_bw: str | None = None, symmetric: bool = False
    ) -> dict[str, Any]:
        """Says with which peers an agent shall be connected.

        Args:
            min_bw: bandwidth that its connections shall have, as in ``"100Gbps"``.
            symmetric: say the same of each of them, towards this agent.

        Raises:
            NanoCtrlError: it could not be done.
        """
        return self._do(
            self._operations.set_desired_topology(alias, target_peers=target_peers, min_bw=min_bw, symmetric=symmetric)
        )

    def query_peers(self) -> list[dict[str, Any]]:
        """The peer agents of this scope.

        Raises:
            NanoCtrlError: they cannot be asked for.
        """
        return self._do(self._operations.query_peers())

    # --- asking --------------------------------------------------------------------------------------------------

    def _do(self, exchange: Exchange[T]) -> T:
        try:
            call = next(exchange)
            while True:
                try:
                    content = self._ask(call)
                except NanoCtrlError as error:
                    call = exchange.throw(error)
                else:
                    call = exchange.send(content)
        except StopIteration as ended:
            result: T = ended.value
            return result

    def _ask(self, call: Call) -> bytes:
        try:
            try:
                answer = self._send(call)
            except ProtocolError:
                # The server ended a kept connection in the moment in which it was used.
                if not call.again:
                    raise
                answer = self._send(call)
        except HTTPError as error:
            reason = str(error).partition("): ")[2] or str(error)  # Without the library's objects in front.
            raise NanoCtrlError(f"{self._place.base}: {reason}") from error
        return calls.checked(call, answer.status, answer.data)

    def _send(self, call: Call) -> urllib3.BaseHTTPResponse:
        return self._connections().urlopen(
            call.method,
            f"{self._path}/{call.path}",
            body=call.content,
            headers=self._place.headers,
            timeout=urllib3.Timeout(total=call.timeout_s),
            retries=False,
            redirect=False,
        )

    def _connections(self) -> urllib3.HTTPConnectionPool:
        with self._lock:
            if self._pool is None or self._pool_of != os.getpid():  # Those of a parent are the parent's.
                self._pool = urllib3.connection_from_url(self._place.base, maxsize=CONNECTIONS_KEPT, block=False)
                self._pool_of = os.getpid()
            return self._pool
