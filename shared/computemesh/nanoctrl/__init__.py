"""NanoCtrl's side of programs: its client, synchronous and asynchronous, and its command line.

::

    from computemesh.nanoctrl import NanoCtrlClient

    client = NanoCtrlClient("127.0.0.1:3000", scope="my-session")
    if client.register("prefill-0", {"role": "prefill", "world_size": 8, ...}):
        client.start_heartbeat(on_not_found=again)
    ...
    client.stop()

It speaks to computemesh's control plane, and to NanoCtrl's own server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from computemesh.nanoctrl.calls import NanoCtrlError
from computemesh.nanoctrl.client import NanoCtrlClient

if TYPE_CHECKING:
    from computemesh.nanoctrl.aio import AsyncNanoCtrlClient

__all__ = ["AsyncNanoCtrlClient", "NanoCtrlClient", "NanoCtrlError"]


def __getattr__(name: str) -> Any:
    # Its HTTP library takes long to load, which programs without an event loop need not wait for.
    if name == "AsyncNanoCtrlClient":
        from computemesh.nanoctrl.aio import AsyncNanoCtrlClient

        return AsyncNanoCtrlClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
