"""NanoCtrl's interface: its paths and bodies, with our handlers behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from computemesh import __version__
from computemesh.addresses import without_login
from computemesh.bus import TimedOut, micro
from computemesh.contracts import nanoctrl
from computemesh.contracts.base import Message, Refused, Route, convert, decode, encode, refused, too_deep
from computemesh.contracts.engines import (
    ENGINE,
    EngineHeartbeat,
    EngineRegister,
    EngineUnregister,
)
from computemesh.contracts.nanoctrl import (
    AGENT,
    Cleanup,
    DesiredTopology,
    Done,
    EngineFound,
    EngineNamed,
    EntityFound,
    EntityList,
    EntityNamed,
    GetMrInfo,
    GetRedisAddress,
    Heard,
    Heartbeat,
    InScope,
    ListEntities,
    MrFound,
    MrInfo,
    PeerAgentStarted,
    RedisAddress,
    RegisterEngine,
    RegisterEntity,
    RegisterMr,
    StartPeerAgent,
    Status,
)
from computemesh.contracts.peer_records import MemoryEntry, MemoryRecord, PeerRecord
from computemesh.contracts.peers import PeerGet, PeerRegister, Topology, TopologyPut
from computemesh.edge import Extra, declared, read_body
from computemesh.edge.http import is_loopback, media_type, nano_error
from computemesh.ids import new_id
from computemesh_services.control_plane import words
from computemesh_services.control_plane.engine_desk import EngineDesk
from computemesh_services.control_plane.peer_desk import PeerDesk
from computemesh_services.control_plane.shelf import WITHIN_S

Q = TypeVar("Q", bound=Message)

NO_JSON: Final = "Failed to parse the request body as JSON"
NO_FIT: Final = "Failed to deserialize the JSON body into the target type"
NO_TYPE: Final = "Expected request with `Content-Type: application/json`"


class NanoCtrlDoor:
    """Answers NanoCtrl's clients.

    Args:
        nats_url: where the bus is.
        public_address: `host:port` of it for other machines; empty where nobody said.
        away: why the bus cannot be reached; empty while it can.
    """

    def __init__(
        self,
        engines: EngineDesk,
        peers: PeerDesk,
        *,
        nats_url: str,
        public_address: str,
        away: Callable[[], str],
    ) -> None:
        self._engines = engines
        self._peers = peers
        self._local = without_login(nats_url).partition(",")[0]
        self._public = f"nats://{public_address}" if public_address else self._local
        self._away = away

    def routes(self) -> list[Extra]:
        return [
            # They are tried in this order: first what is asked all the time.
            self._route(nanoctrl.HEARTBEAT, Heartbeat, self.on_heartbeat),
            self._route(nanoctrl.HEARTBEAT_ENGINE, Heartbeat, lambda said: self.on_heartbeat(said, ENGINE)),
            self._route(nanoctrl.HEARTBEAT_AGENT, Heartbeat, lambda said: self.on_heartbeat(said, AGENT)),
            self._route(nanoctrl.LIST_ENGINES, InScope, self.on_list_engines),
            self._route(nanoctrl.GET_ENGINE_INFO, EngineNamed, self.on_get_engine_info),
            self._route(nanoctrl.REGISTER_ENGINE, RegisterEngine, self.on_register_engine),
            self._route(nanoctrl.UNREGISTER_ENGINE, EngineNamed, self.on_unregister_engine),
            Extra(method="GET", path="/", handler=_to_the_page, accept="text/html"),
            Extra(method="GET", path="/", handler=self.on_root),
            self._route(nanoctrl.REGISTER, RegisterEntity, self.on_register),
            self._route(nanoctrl.UNREGISTER, EntityNamed, self.on_unregister),
            self._route(nanoctrl.GET_ENTITY_INFO, EntityNamed, self.on_get_entity_info),
            self._route(nanoctrl.LIST_ENTITIES, ListEntities, self.on_list_entities),
            self._route(nanoctrl.START_PEER_AGENT, StartPeerAgent, self.on_start_peer_agent),
            self._route(nanoctrl.QUERY, InScope, self.on_query),
            self._route(nanoctrl.REGISTER_MR, RegisterMr, self.on_register_mr),
            self._route(nanoctrl.GET_MR_INFO, GetMrInfo, self.on_get_mr_info),
            self._route(nanoctrl.DESIRED_TOPOLOGY, DesiredTopology, self.on_desired_topology),
            self._route(nanoctrl.CLEANUP, Cleanup, self.on_cleanup),
            self._route(nanoctrl.GET_REDIS_ADDRESS, GetRedisAddress, self.on_get_redis_address),
        ]

    def _route(self, route: Route, kind: type[Q], handler: Callable[[Q], Awaitable[Any]]) -> Extra:
        async def handle(request: Request) -> Response:
            said = await read(request, kind)
            answer = said if isinstance(said, Refused) else await answered(request.scope["path"], handler(said))
            if isinstance(answer, Refused):
                return nano_error(answer)
            body = answer if isinstance(answer, bytes) else encode(answer)
            return Response(body, media_type="application/json")

        # An alias may have a slash, and comes decoded.
        return replace(declared(route, handle), path=route.http.path.replace("{agent}", "{agent:path}"))

    async def on_root(self, _: Request) -> Response:
        """What NanoCtrl says while it runs; but only while it can do anything."""
        if reason := self._away():
            return PlainTextResponse(f"computemesh {__version__} control-plane: {reason}\n", 503)
        said = f"{nanoctrl.RUNNING}\ncomputemesh {__version__} control-plane; its interface is described at /docs\n"
        return PlainTextResponse(said)

    # --- engines -----------------------------------------------------------------------------------------------------

    async def on_register_engine(self, said: RegisterEngine) -> Done | Refused:
        answer = await self._engines.on_register(
            EngineRegister(
                scope=said.scope or "",
                engine_id=said.engine_id,
                role=said.role,
                world_size=said.world_size,
                num_blocks=said.num_blocks,
                host=said.host,
                port=said.port,
                peer_addrs=said.peer_addrs,
                p2p_host=said.p2p_host,
                p2p_port=said.p2p_port,
                max_num_seqs=said.max_num_seqs,
                model_path=said.model_path,
            )
        )
        if isinstance(answer, Refused):
            return answer
        return Done(message=f"Engine {said.engine_id} registered successfully")

    async def on_unregister_engine(self, said: EngineNamed) -> Done | Refused:
        answer = await self._engines.on_unregister(EngineUnregister(scope=said.scope or "", engine_id=said.engine_id))
        if isinstance(answer, Refused):
            return answer
        return Done(message=f"Engine {said.engine_id} unregistered successfully")

    async def on_heartbeat(self, said: Heartbeat, kind: str = "") -> Heard | Refused:
        """A heartbeat in either shape; the path says whose it is where the body does not."""
        if said.entity_id is None and said.engine_id is not None:
            entity_type, entity_id = said.entity_type or kind or ENGINE, said.engine_id
        elif said.entity_id is None:
            return _missing("engine_id" if kind == ENGINE else "entity_id")
        elif not (said.entity_type or kind):
            return _missing("entity_type")
        else:
            entity_type, entity_id = said.entity_type or kind, said.entity_id
        scope = said.scope or ""
        if entity_type == AGENT:
            found = await self._peers.beat(scope, entity_id)
        else:
            heard = await self._engines.on_heartbeat(
                EngineHeartbeat(scope=scope, entity_type=entity_type, engine_id=entity_id)
            )
            if isinstance(heard, Refused):
                return heard
            found = heard.found
        if found:
            return Heard(status="ok", message=f"Heartbeat successful for {entity_type} {entity_id}")
        return Heard(status="not_found", message=f"{entity_type} {entity_id} not found. Please register first.")

    async def on_get_engine_info(self, said: EngineNamed) -> EngineFound | Refused:
        found = await self._engines.find(said.scope or "", ENGINE, said.engine_id)
        if isinstance(found, Refused):
            return found
        if found is None:
            return EngineFound(status="not_found", engine_info=None)
        return EngineFound(status="ok", engine_info=words.info(found))

    async def on_list_engines(self, said: InScope) -> bytes | Refused:
        return self._engines.stale() or self._engines.roll.listed(said.scope or "")

    # --- entities ----------------------------------------------------------------------------------------------------

    async def on_register(self, said: RegisterEntity) -> Done | Refused:
        if said.entity_type in OWN_WAYS:
            reason = f"{NO_FIT}: an entity of type '{said.entity_type}' registers by {OWN_WAYS[said.entity_type]}"
            return Refused(code="bad_message", reason=reason, field="entity_type", status=422)
        answer = await self._engines.on_register(
            EngineRegister(
                scope=said.scope or "",
                entity_type=said.entity_type,
                engine_id=said.entity_id,
                kind=said.kind,
                endpoint=said.endpoint,
                metadata=said.metadata,
                resource=said.resource,
            )
        )
        if isinstance(answer, Refused):
            return answer
        return Done(message=f"Entity {said.entity_type}:{said.entity_id} registered successfully")

    async def on_unregister(self, said: EntityNamed) -> Done | Refused:
        if said.entity_type == AGENT:
            dropped = await self._peers.cleanup(said.scope or "", said.entity_id)
            if isinstance(dropped, Refused):
                return dropped
        else:
            answer = await self._engines.on_unregister(
                EngineUnregister(scope=said.scope or "", entity_type=said.entity_type, engine_id=said.entity_id)
            )
            if isinstance(answer, Refused):
                return answer
        return Done(message=f"Entity {said.entity_type}:{said.entity_id} unregistered successfully")

    async def on_get_entity_info(self, said: EntityNamed) -> EntityFound | Refused:
        if said.entity_type == AGENT:
            peer = await self._peers.on_get(PeerGet(scope=said.scope or "", alias=said.entity_id))
            if not isinstance(peer, Refused):
                return EntityFound(status="ok", entity_info=words.agent_entity(peer))
            return peer if peer.status != 404 else EntityFound(status="not_found", entity_info=None)
        found = await self._engines.find(said.scope or "", said.entity_type, said.entity_id)
        if isinstance(found, Refused):
            return found
        if found is None:
            return EntityFound(status="not_found", entity_info=None)
        return EntityFound(status="ok", entity_info=words.entity(found))

    async def on_list_entities(self, said: ListEntities) -> bytes | EntityList | Refused:
        if (stale := self._engines.stale() or self._peers.stale()) is not None:
            return stale
        scope, roll = said.scope or "", self._engines.roll
        if said.entity_type is None and said.kind is None:
            lists = [part for part in (roll.entities(scope), self._peers.listed(scope, words.agent_entity)) if part]
            return b'{"status":"ok","entities":[%b]}' % b",".join(lists)
        found = [words.entity(record) for record in roll.matching(scope, said.entity_type, said.kind)]
        if said.entity_type in (None, AGENT) and said.kind in (None, words.AGENT_KIND):
            found += [words.agent_entity(peer) for peer in self._peers.of(scope)]
        return EntityList(entities=found)

    # --- peer agents -------------------------------------------------------------------------------------------------

    async def on_start_peer_agent(self, said: StartPeerAgent) -> PeerAgentStarted | Refused:
        asked = PeerRegister(
            scope=said.scope or "",
            alias=said.alias,
            name_prefix=said.name_prefix,
            instance=new_id("i"),  # It has none that it could show later.
            address=said.address,
            device=said.device,
            ib_port=said.ib_port,
            link_type=said.link_type,
            resource=said.resource or {},
        )
        answer = await self._peers.register(asked, None)
        if isinstance(answer, Refused):
            return answer
        started = PeerAgentStarted(
            status="ok",
            name=answer.alias,
            redis_address=self._local if is_loopback(_host(said.address)) else self._public,
        )
        return started if said.resource is None else msgspec.structs.replace(started, resource=said.resource)

    async def on_query(self, said: InScope) -> bytes | Refused:
        return self._peers.stale() or b"[%b]" % self._peers.listed(said.scope or "", words.agent)

    async def on_register_mr(self, said: RegisterMr) -> Status | Refused:
        entry = MemoryEntry(length=said.length, addr=said.addr, rkey=said.rkey, lkey=said.lkey)
        scope = said.scope or ""
        owner = await self._peers.find(scope, said.agent_name)
        if owner is not None and owner.instance is not None:
            return _through_its_node(owner)
        stored = await self._peers.put_memory(scope, said.agent_name, None, said.mr_name, entry)
        return Status() if isinstance(stored, MemoryRecord) else stored

    async def on_get_mr_info(self, said: GetMrInfo) -> MrFound | Refused:
        found = await self._peers.memory(said.scope or "", said.dst, said.mr_name)
        if isinstance(found, Refused):
            return found
        if found is None:
            return MrFound(mr_info=None)
        return MrFound(mr_info=MrInfo(addr=found.addr, length=found.length, rkey=found.rkey, lkey=found.lkey))

    async def on_desired_topology(self, said: DesiredTopology) -> Status | Refused:
        asked = TopologyPut(
            scope=said.scope or "",
            alias=said.agent,
            target_peers=said.target_peers,
            min_bw=said.min_bw,
            symmetric=said.symmetric,
        )
        stored = await self._peers.on_topology_put(asked)
        return Status() if isinstance(stored, Topology) else stored

    async def on_cleanup(self, said: Cleanup) -> Done | Refused:
        owner = await self._peers.find(said.scope or "", said.agent_name)
        if owner is not None and owner.instance is not None:
            return _through_its_node(owner)
        outcome = await self._peers.cleanup(said.scope or "", said.agent_name)
        if isinstance(outcome, Refused):
            return outcome
        if outcome == "kept":
            return Done(message=f"Agent {said.agent_name} stays: the one that registered this name first keeps it")
        return Done(message=f"Cleaned up agent: {said.agent_name}")

    async def on_get_redis_address(self, _: GetRedisAddress) -> RedisAddress:
        return RedisAddress(redis_address=self._public)


async def answered(path: str, answering: Awaitable[Any]) -> Any:
    """An answer while the caller still waits for it, or the refusal that stands for what went wrong."""

    async def in_time() -> Any:
        try:
            async with asyncio.timeout(WITHIN_S):
                return await answering
        except TimeoutError:
            raise TimedOut(f"the store did not answer in {WITHIN_S:g} s") from None

    return await micro.guarded(path, in_time())


OWN_WAYS: Final = {ENGINE: "/register_engine", AGENT: "/start_peer_agent"}


async def _to_the_page(_: Request) -> Response:
    return RedirectResponse("/docs")


async def read(request: Request, kind: type[Q]) -> Q | Refused:
    """The request's body and path as a message of *kind*, or the refusal with NanoCtrl's statuses."""
    if media_type(request) != "application/json":
        return Refused(code="bad_content_type", reason=NO_TYPE, status=415)
    body = await read_body(request)
    if isinstance(body, Refused):
        return body
    if not body:
        return Refused(code="bad_message", reason=f"{NO_JSON}: the body is empty")
    if not request.path_params and not isinstance(said := decode(body, kind), Refused):
        return said
    try:
        if too_deep(body):
            raise RecursionError
        fields = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:
        answer = refused(error, data=body)
        return msgspec.structs.replace(answer, reason=f"{NO_JSON}: {answer.reason}")
    if not isinstance(fields, dict):
        return Refused(code="bad_message", reason=f"{NO_FIT}: expected an object", status=422)
    found = convert({**fields, **request.path_params}, kind)
    if not isinstance(found, Refused):
        return found
    reason = ": ".join(part for part in (NO_FIT, found.field, found.reason) if part)
    return msgspec.structs.replace(found, reason=reason, status=422)


def _missing(field: str) -> Refused:
    return Refused(code="bad_message", reason=f"{NO_FIT}: missing field `{field}`", field=field, status=422)


def _through_its_node(owner: PeerRecord) -> Refused:
    reason = f"'{owner.alias}' belongs to the peer-agent of node {owner.node_id}, which alone speaks for it"
    return Refused(code="not_yours", reason=reason, status=409)


def _host(address: str) -> str:
    """The host in an address that may have a port."""
    return address.rpartition(":")[0].strip("[]") if address.count(":") == 1 or "]" in address else address
