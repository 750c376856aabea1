"""The asynchronous client."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from computemesh.nanoctrl import calls
from computemesh.nanoctrl.calls import Call, Exchange, NanoCtrlError, Operations, log
from computemesh.tasks import end_all

T = TypeVar("T")


class AsyncNanoCtrlClient:
    """:class:`~computemesh.nanoctrl.NanoCtrlClient` for programs on an event loop: the same methods and answers, each
    a coroutine but :meth:`start_heartbeat`. It belongs to the loop in which it is first used.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, address: str, scope: str | None = None, *, token: str | None = None) -> None:
        self._place = calls.place(address, token)
        self._operations = Operations(scope)
        self._session: aiohttp.ClientSession | None = None
        self._beating: tuple[asyncio.Task[None], asyncio.Event] | None = None
        self._stopping = asyncio.Lock()

    @property
    def registered(self) -> bool:
        """Whether the engine is registered, by what the control plane said last."""
        return self._operations.registered

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.stop()

    # --- engines -------------------------------------------------------------------------------------------------

    async def check_connection(self) -> None:
        """Asks whether the control plane is there.

        Raises:
            RuntimeError: it is not, or cannot serve; the message says why.
        """
        await self._do(self._operations.check(self._place))

    async def register(self, engine_id: str, extra: Mapping[str, Any]) -> bool:
        """Registers an engine, and makes it the one of this client."""
        return await self._do(self._operations.register(engine_id, extra))

    async def unregister(self) -> bool:
        """Takes the engine out of the control plane; False also when there was none."""
        return await self._do(self._operations.unregister())

    async def heartbeat(self) -> str:
        """Keeps the engine registered for another 60 s: ``"ok"``, ``"not_found"`` or ``"error"``."""
        return await self._do(self._operations.heartbeat())

    async def get_redis_url(self) -> str | None:
        """Where the bus is: ``nats://host:port`` of computemesh's control plane, ``redis://host:port`` of
        NanoCtrl's."""
        return await self._do(self._operations.bus_url())

    async def get_engine_info(self, engine_id: str) -> dict[str, Any] | None:
        """What is registered of an engine of this scope; None when it is not, or cannot be asked."""
        return await self._do(self._operations.engine_info(engine_id))

    async def list_engines(self) -> list[dict[str, Any]]:
        """The engines of this scope; none also when they cannot be asked for."""
        return await self._do(self._operations.list_engines())

    # --- heartbeats ----------------------------------------------------------------------------------------------

    def start_heartbeat(
        self,
        interval: float = calls.INTERVAL_S,
        on_not_found: Callable[[], object] | None = None,
        name: str = calls.HEARTBEAT_NAME,
    ) -> None:
        """Sends heartbeats from a task, the first after one interval. While it runs, a second call does nothing.

        Args:
            interval: seconds from the end of one heartbeat to the next.
            on_not_found: called when the control plane does not know the engine: usually it registers it again. What
                it gives is awaited where that is possible.
            name: of the task.

        Raises:
            ValueError: the interval is not above 0.
            RuntimeError: no event loop runs.
        """
        calls.check_interval(interval)
        if self._beating is not None and not self._beating[0].done() and not self._beating[1].is_set():
            return
        stop = asyncio.Event()
        self._beating = (
            asyncio.get_running_loop().create_task(self._beat(interval, on_not_found, stop), name=name),
            stop,
        )

    async def _beat(self, interval_s: float, on_not_found: Callable[[], object] | None, stop: asyncio.Event) -> None:
        while not await _happened(stop, interval_s):
            if await self.heartbeat() == "not_found" and on_not_found is not None and not stop.is_set():
                calls.tell_unknown(self._operations)
                try:
                    answer = on_not_found()
                    if inspect.isawaitable(answer):
                        await answer
                except Exception:
                    log.exception("on_not_found failed")

    async def stop_heartbeat(self, timeout: float = calls.STOP_S) -> None:
        """Ends the heartbeats; one that is under way is given so many seconds."""
        if self._beating is None:
            return
        task, stop = self._beating
        stop.set()
        if task is not asyncio.current_task():  # on_not_found may stop the client.
            await asyncio.wait({task}, timeout=timeout)
            await end_all([task])

    async def stop(self, timeout: float = calls.STOP_S) -> None:
        """Ends the heartbeats, unregisters the engine if it is registered, and closes the connections. May be called
        any number of times; what is asked afterwards opens a connection again."""
        await self.stop_heartbeat(timeout)
        async with self._stopping:
            if self.registered:
                await self.unregister()
            session, self._session = self._session, None
            if session is not None:
                await session.close()

    # --- peers ---------------------------------------------------------------------------------------------------

    async def register_peer(
        self, *, alias: str | None, device: str, ib_port: int, link_type: str, address: str, name_prefix: str
    ) -> dict[str, Any]:
        """Registers a peer agent; gives its ``name``, made from *name_prefix* where there is no alias, and
        ``redis_address``.

        Raises:
            NanoCtrlError: with ``status_code`` 409 when the alias is taken.
        """
        return await self._do(
            self._operations.register_peer(
                alias=alias,
                device=device,
                ib_port=ib_port,
                link_type=link_type,
                address=address,
                name_prefix=name_prefix,
            )
        )

    async def cleanup_peer(self, agent_name: str) -> dict[str, Any]:
        """Forgets a peer agent and all that is its own.

        Raises:
            NanoCtrlError: it could not be done.
        """
        return await self._do(self._operations.cleanup_peer(agent_name))

    async def heartbeat_peer(self, agent_name: str) -> dict[str, Any]:
        """Keeps a peer agent registered for another 60 s; ``status`` of the answer is ``ok`` or ``not_found``.

        Raises:
            NanoCtrlError: it could not be done.
        """
        return await self._do(self._operations.heartbeat_peer(agent_name))

    async def set_desired_topology(
        self, alias: str, *, target_peers: list[str], min_bw: str | None = None, symmetric: bool = False
    ) -> dict[str, Any]:
        """Says with which peers an agent shall be connected.

        Args:
            min_bw: bandwidth that its connections shall have, as in ``"100Gbps"``.
            symmetric: say the same of each of them, towards this agent.

        Raises:
            NanoCtrlError: it could not be done.
        """
        return await self._do(
            self._operations.set_desired_topology(alias, target_peers=target_peers, min_bw=min_bw, symmetric=symmetric)
        )

    async def query_peers(self) -> list[dict[str, Any]]:
        """The peer agents of this scope.

        Raises:
            NanoCtrlError: they cannot be asked for.
        """
        return await self._do(self._operations.query_peers())

    # --- asking --------------------------------------------------------------------------------------------------

    async def _do(self, exchange: Exchange[T]) -> T:
        try:
            call = next(exchange)
            while True:
                try:
                    content = await self._ask(call)
                except NanoCtrlError as error:
                    call = exchange.throw(error)
                else:
                    call = exchange.send(content)
        except StopIteration as ended:
            result: T = ended.value
            return result

    async def _ask(self, call: Call) -> bytes:
        try:
            try:
                status_code, content = await self._send(call)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # The server ended a kept connection in the moment in which it was used.
                if not call.again or isinstance(error, aiohttp.ClientConnectorError):
                    raise
                status_code, content = await self._send(call)
        except TimeoutError:
            raise NanoCtrlError(f"{self._place.base}: no answer in {call.timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise NanoCtrlError(f"{self._place.base}: {error}") from error
        return calls.checked(call, status_code, content)

    async def _send(self, call: Call) -> tuple[int, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        async with self._session.request(
            call.method,
            f"{self._place.base}/{call.path}",
            data=call.content,
            headers=self._place.headers,
            timeout=aiohttp.ClientTimeout(total=call.timeout_s),
            allow_redirects=False,
        ) as answer:
            return answer.status, await answer.read()


async def _happened(event: asyncio.Event, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            return await event.wait()
    except TimeoutError:
        return False
