"""The conversation with RoleMesh's dispatcher: this node registers there, and says from time to time how it is.

It is another system's: whatever it does or fails to do shows in this agent's log and health, and harms nothing else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from prometheus_client import Gauge

from computemesh import __version__, log
from computemesh.config import ConfigError
from computemesh.contracts.base import Message, encode
from computemesh.contracts.rolemesh import STALE_S, NodeBeat, NodeRegister

REGISTER: Final = "/v1/nodes/register"
HEARTBEAT: Final = "/v1/nodes/heartbeat"

ANSWER_S: Final = 10.0
"""How long the dispatcher may take for an answer, all told."""

CONNECT_S: Final = 5.0

COMPLAINT_BYTES_MAX: Final = 2048
"""Of an answer that says no, so much is read for the log."""

COMPLAINT_CHARS: Final = 200

KNOWN: Final = Gauge(
    "computemesh_agent_dispatcher_up", "Whether the dispatcher that this node is told to report to took its heartbeat."
)

_log = log.get("dispatcher")


def checked(base_url: str, what: str) -> str:
    """The address of a dispatcher or of this node, without the slash at its end.

    Args:
        what: the setting that says it, for the complaint.

    Raises:
        ConfigError: it is no http or https address, or has what does not belong in it.
    """
    try:
        parts = urlsplit(base_url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"{what}={base_url!r}: {error}") from None
    if parts.username is not None or parts.password is not None:  # Not to be repeated in a log.
        raise ConfigError(f"{what}: leave name and password out of the address; COMPUTEMESH_DISPATCHER_KEY is the key")
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(f"{what}={base_url!r}: write http://host:port or https://host:port")
    return base_url.rstrip("/")


def pause_s(failures: int, interval_s: float, chance: float) -> float:
    """How long to wait before the next heartbeat.

    Args:
        failures: in a row. The pause doubles with each, up to when the dispatcher calls a node stale.
        chance: from 0 to 1; spreads the nodes of a fleet.
    """
    if failures == 0:
        return interval_s * (0.9 + 0.2 * chance)
    longest_s = max(interval_s, STALE_S)
    doubled_s: float = min(longest_s, interval_s * 2 ** min(failures - 1, 16))
    return doubled_s * (0.5 + 0.5 * chance)


def trouble(path: str, status: int, said: str) -> str:
    """What an answer complains of; empty when it is a yes."""
    if 200 <= status < 300:
        return ""
    about = f" ({said})" if said else ""
    if status in (401, 403):
        return f"it does not take this node's key: status {status}{about}; COMPUTEMESH_DISPATCHER_KEY sets it"
    if 300 <= status < 400:
        return f"it redirects {path}: status {status}; set the address that it means"
    if status == 404 and path == REGISTER:
        return f"it has no {path}: is it a dispatcher?"
    return f"it answers {path} with status {status}{about}"


class Dispatcher:
    """Reports to one dispatcher, for as long as :meth:`run` runs.

    Args:
        base_url: as :func:`checked` gave it.
        key: shown as a bearer token and in the header of RoleMesh's nodes; empty for none.
        register: makes what is posted first, and after the dispatcher has forgotten this node.
        beat: makes what is posted every *interval_s*.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: str,
        interval_s: float,
        register: Callable[[], NodeRegister],
        beat: Callable[[], NodeBeat],
    ) -> None:
        self._base_url = base_url
        self._headers = {"Content-Type": "application/json", "User-Agent": f"computemesh/{__version__}"}
        if key:
            self._headers |= {"Authorization": f"Bearer {key}", "X-RoleMesh-Node-Key": key}
        self._interval_s = interval_s
        self._register = register
        self._beat = beat
        self._registered = False
        self.problem = "not reached yet"
        """Why the dispatcher does not know that this node is well; empty when it does."""

    async def run(self) -> None:
        """Reports until it is cancelled."""
        failures = 0
        limits = aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CONNECT_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=limits) as http:
            while True:
                problem = await self._report(http)
                failures = failures + 1 if problem else 0
                self._note(problem)
                await asyncio.sleep(pause_s(failures, self._interval_s, random.random()))  # noqa: S311  # jitter

    async def _report(self, http: aiohttp.ClientSession) -> str:
        """One heartbeat, with a registration before it where that is needed. What went wrong, or nothing."""
        try:
            for _ in range(2):
                if not self._registered:
                    status, said = await self._post(http, REGISTER, self._register())
                    if wrong := trouble(REGISTER, status, said):
                        return wrong
                    self._registered = True
                status, said = await self._post(http, HEARTBEAT, self._beat())
                if status != 404:
                    return trouble(HEARTBEAT, status, said)
                self._registered = False  # It began a new life, or has forgotten nodes: once more, at once.
        except TimeoutError:
            return f"it does not answer within {ANSWER_S:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return f"it cannot be reached: {str(error) or type(error).__name__}"
        return f"it answers {HEARTBEAT} with status 404 for a node that it has just registered"

    async def _post(self, http: aiohttp.ClientSession, path: str, message: Message) -> tuple[int, str]:
        """The status of the answer, and what it says if that is no yes."""
        url = f"{self._base_url}{path}"
        async with http.post(url, data=encode(message), allow_redirects=False) as answer:
            said = await answer.content.read(COMPLAINT_BYTES_MAX)
            text = " ".join(said.decode("utf-8", "replace").split())[:COMPLAINT_CHARS]
            return answer.status, "" if answer.ok else text

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            if problem:
                _log.warning("the dispatcher does not take this node", url=self._base_url, reason=problem)
            else:
                _log.info("the dispatcher takes this node", url=self._base_url)
        self.problem = problem
        KNOWN.set(not problem)
