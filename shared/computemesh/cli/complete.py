"""What the Tab key offers: names from the contracts, ids from the mesh.

It must never get in the way: without a mesh, or with one that does not answer at once, it offers nothing and
says nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from computemesh.bus import Bus
from computemesh.cli import common, subjects
from computemesh.contracts import engines, gpus, nodes, work
from computemesh.contracts import keys as key_contracts
from computemesh.contracts import peers as peer_contracts
from computemesh.contracts.base import Message, Refused, Request, Role
from computemesh.contracts.catalog import events, requests

WAIT_S: Final = 0.7
"""How long a person at the prompt waits for the mesh, at most."""

OFFERED_MAX: Final = 200


def _offer(names: Iterable[tuple[str, str]], incomplete: str) -> list[CompletionItem]:
    """Each name that begins so, with its explanation, once."""
    fitting = {name: about for name, about in names if name.startswith(incomplete)}
    return [CompletionItem(name, help=about or None) for name, about in list(fitting.items())[:OFFERED_MAX]]


def event_names(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Conversations and events; full subjects once the word begins like one."""
    shorts = [(name, "all of this conversation") for name in subjects.conversations()]
    shorts += [(subjects.short(event.subject), event.about) for event in events()]
    full = [(subjects.pattern(event).removesuffix(".*"), event.about) for event in events()]
    return _offer(full if incomplete.startswith("compute") else shorts, incomplete)


def request_names(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What can be called; full subjects once the word begins like one."""
    shorts = [(subjects.short(request.subject), request.about) for request in requests()]
    full = [(request.subject, request.about) for request in requests()]
    return _offer(full if incomplete.startswith("compute") else shorts, incomplete)


def work_ids(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The newest items."""
    found = _asked(work.LIST, work.WorkList(limit=OFFERED_MAX))
    return _offer(
        [(item.work_id, f"{item.state}, {item.work_type}") for item in found.items] if found else [], incomplete
    )


def node_ids(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _offer([(node.node_id, f"{node.state}, {node.tier}") for node in _nodes()], incomplete)


def reservation_ids(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Reservations of GPU memory."""
    return _offer([(one.reservation_id, f"{one.owner}, {one.node_id}") for one in _reservations()], incomplete)


def owners(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Owners who have reserved GPU memory."""
    return _offer([(one.owner, "") for one in _reservations() if one.owner], incomplete)


def keys(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """API keys by name."""
    found = _asked(key_contracts.LIST, key_contracts.KeysList(limit=OFFERED_MAX), Role.CLIENT)
    return _offer([(key.name, "") for key in found.keys] if found else [], incomplete)


def registered(context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What is registered with the control plane, in the scope that was given."""
    found = _asked(engines.LIST, engines.EnginesList(scope=_scope(context), limit=OFFERED_MAX))
    return _offer([(one.engine_id, one.role or one.kind) for one in found.engines] if found else [], incomplete)


def peers(context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Peer agents of the scope that was given."""
    found = _asked(peer_contracts.LIST, peer_contracts.PeersList(scope=_scope(context), limit=OFFERED_MAX))
    return _offer([(peer.alias, peer.node_id or peer.address) for peer in found.peers] if found else [], incomplete)


def _scope(context: click.Context) -> str:
    return context.params.get("scope") or ""


def models(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Models that some node serves."""
    return _offer([(model, node.node_id) for node in _nodes() for model in node.models], incomplete)


def work_types(_: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Types every mesh knows, and those that some node takes."""
    known = [(name, "") for name in work.WORK_TYPES]
    return _offer(known + [(name, node.node_id) for node in _nodes() for name in node.work_types], incomplete)


def _nodes() -> list[nodes.NodeView]:
    found = _asked(nodes.QUERY, nodes.NodesQuery(limit=OFFERED_MAX))
    return found.nodes if found else []


def _reservations() -> list[gpus.GpuReservation]:
    found = _asked(gpus.LIST, gpus.GpuList(limit=OFFERED_MAX))
    return found.reservations if found else []


def _asked(request: Request[Any, Any], question: Message, role: Role = Role.OBSERVER) -> Any:
    """The answer, or None when there is none soon, for whatever reason."""

    async def fetch() -> Any:
        bus = Bus(common.bus_address(role), on_denied=lambda _: None)
        try:
            await bus.connect(timeout_s=WAIT_S, wait_for_server=False)
            answer = await bus.ask(request, question, timeout_s=WAIT_S)
            return None if isinstance(answer, Refused) else answer
        finally:
            await bus.close()

    # Whatever goes wrong, an error in the middle of somebody's command line is worse than no offer.
    with contextlib.suppress(Exception):
        return common.run(fetch())
    return None
