"""`start_peer_agent`: takes part as a peer, and moves bytes between this process's memory and that of others.

    with start_peer_agent(alias="worker-a", scope="job-123") as agent:
        agent.register_memory_region("kv", buffer)
        agent.connect_to("worker-b").wait()
        agent.read("worker-b", [("kv", 0, 0, 4096)]).wait()

The interface is that of DLSlime's `PeerAgent`; programs written for it need another import and address. All methods may
be called from any thread.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Sequence
from numbers import Integral
from types import TracebackType
from typing import Any, Final, Literal, Self, cast, get_args

import msgspec

from computemesh.contracts.peers import Bandwidth
from computemesh.ids import EntityId, Scope
from computemesh.peer import memory as shared_memory
from computemesh.peer.address import check_mesh, read_address
from computemesh.peer.assignments import Assignments
from computemesh.peer.attachment import Attach, OnClosed, OnTold, Signals
from computemesh.peer.choice import DEMANDS
from computemesh.peer.connection import PeerConnection
from computemesh.peer.core import Core
from computemesh.peer.errors import NO_WAY, PeerError
from computemesh.peer.futures import ImmFuture, MessageFuture, TransferFuture
from computemesh.peer.memory import Descriptor, SharedMemory
from computemesh.peer.rdma import RdmaEndpoint
from computemesh.peer.rdma.nics import gbps
from computemesh.peer.regions import Memory, check_name, is_address, memory_of, whole_number
from computemesh.peer.resource import first_port, resource_of
from computemesh.peer.shm import ShmEndpoint
from computemesh.peer.signals import Hello
from computemesh.peer.socket import AgentSocket
from computemesh.peer.tcp import TcpEndpoint
from computemesh.peer.transport import Endpoint

HOST_VARIABLE: Final = "COMPUTEMESH_PEER_HOST"
"""Names this machine's address on the network over which peers of other machines reach it."""
IMM_MIN: Final = -(2**31)
IMM_MAX: Final = 2**32 - 1

Expected = int | Sequence[int | None] | None


class PeerMemoryRegion:
    """Shared memory that belongs to an agent: peers of this machine copy from and to it directly.

    Attributes:
        name: under which it is registered.
        handle: the same, for assignments with handles.
        view: its bytes, all zeros at first; writable, format `B`.
        ptr: the address of the first byte.
        length: bytes.
    """

    memory_kind: Final = "shared"
    device: Final = "cpu"

    def __init__(self, agent: PeerAgent, name: str, memory: SharedMemory, handle: int) -> None:
        self._agent = weakref.ref(agent)
        self.name = name
        self.handle = handle
        self.view = memory.view()
        self.ptr = memory.address
        self.length = memory.length
        self.allocation_size = memory.length
        self._closed = False

    def close(self) -> None:
        """Unregisters it. The memory is given back when no view of it is left. Twice is fine."""
        agent = self._agent()
        if not self._closed and agent is not None:
            agent.unregister_memory_region(self.name, handle=self.handle)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


class PeerAgent:
    """A peer. :func:`start_peer_agent` makes one.

    Attributes:
        alias: what it is called in its scope.
        scope: the space of names.
    """

    def __init__(
        self,
        nanoctrl_url: str | os.PathLike[str] | None = None,
        alias: str | None = None,
        device: str | None = None,
        scope: str | None = None,
        *,
        ctrl_url: str | None = None,
        address: str | None = None,
        name_prefix: str = "agent",
        local_host: str | None = None,
        attach: Attach | None = None,
        endpoints: Sequence[Endpoint] | None = None,
    ) -> None:
        where = [one for one in (nanoctrl_url, ctrl_url, address) if one is not None]
        if len(where) > 1:
            raise TypeError("nanoctrl_url, ctrl_url and address are names of one argument; give one of them")
        for field, value in (
            ("nanoctrl_url", where[0] if where else None),
            ("device", device),
            ("local_host", local_host),
        ):
            if value is not None and not isinstance(value, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"{field}: text is wanted, not {type(value).__name__}")
        to = read_address(os.fspath(where[0]) if where else "")
        scope = _checked("scope", scope or "", Scope)
        hello_alias = None if alias is None else _checked("alias", alias, EntityId)
        prefix = _checked("name_prefix", name_prefix, EntityId)
        if len(prefix) > 64:
            raise ValueError(f"name_prefix: it has {len(prefix)} characters; at most 64 leave room for a number")
        local_host = local_host or os.environ.get(HOST_VARIABLE) or None
        self._device = device
        if endpoints is None:
            endpoints = default_endpoints(device, local_host)
        self._resource = resource_of(endpoints, device, local_host)
        hello = Hello(
            scope=scope,
            alias=hello_alias,
            name_prefix=prefix,
            device=device or "",
            resource=self._resource,
            pid=os.getpid(),
        )

        def to_agent(on_told: OnTold, on_closed: OnClosed) -> Signals:
            return AgentSocket(to.socket, hello, on_told=on_told, on_closed=on_closed)

        self._core = Core(attach or to_agent, endpoints)
        self._transfer = self._core.transfers.transfer
        self.alias = self._core.alias
        self.scope = self._core.scope
        if to.url:
            try:
                check_mesh(to.url, self._core)
            except BaseException:
                self.shutdown()
                raise

    def __repr__(self) -> str:
        return f"<PeerAgent {self.alias} of scope {self.scope!r}>"

    @property
    def core(self) -> Core:
        """What the agent is made of; for those that build on it."""
        return self._core

    # --- who and what is there ---------------------------------------------------------------------------------

    def list_agents(self) -> list[str]:
        """Aliases of the peers in this scope, sorted, this one included."""
        return self._core.peers()

    def get_resource(self, peer_alias: str | None = None) -> dict[str, Any] | None:
        """What a peer's machine has to move bytes with.

        Returns:
            `{schema_version, topology_epoch, host: {hostname, address}, nics: [{name, health, numa_node, pci_bus_id,
            ports: [{port, state, link_type, active_mtu}]}], accelerators: [{device_index, name, uuid, pci_bus_id}],
            memory_keys, topology_backends}`; None if there is no such peer.
        """
        if peer_alias is None or peer_alias == self.alias:
            return {**self._resource, "memory_keys": self.list_mem_keys()}
        peer = self._core.peer(peer_alias)
        return None if peer is None else {**peer.resource, "memory_keys": peer.memory_keys}

    def list_mem_keys(self, peer_alias: str | None = None) -> list[str]:
        """Names of a peer's memory regions, sorted; none if there is no such peer."""
        if peer_alias is None or peer_alias == self.alias:
            return self._core.regions.names()
        return sorted(one.name for one in self._core.transfers.memories(peer_alias))

    def set_desired_topology(
        self, target_peers: Sequence[str], *, min_bw: Bandwidth | None = None, symmetric: bool = False
    ) -> None:
        """Says whom this peer is to be connected to, from now on and again after a failure. They need not be there yet.

        Args:
            min_bw: as for `connect_to`.
            symmetric: each of them is to be connected to this one as well.

        Raises:
            TypeError, ValueError: an argument is none.
            PeerError: the control plane does not take it.
        """
        if isinstance(target_peers, str) or not isinstance(target_peers, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"target_peers: a list of aliases is wanted, not {type(target_peers).__name__}")
        _bandwidth(min_bw)
        self._core.set_topology(target_peers, min_bw=min_bw, symmetric=symmetric)

    # --- connections -------------------------------------------------------------------------------------------

    def connect_to(
        self,
        peer_alias: str,
        local_device: str | None = None,
        peer_device: str | None = None,
        ib_port: int | None = 1,
        qp_num: int | None = 1,
        min_bw: str | None = None,
        transport: str = "auto",
        local_host: str | None = None,
        local_port: int = 0,
    ) -> PeerConnection:
        """The connection with a peer: the one there is, whichever side asked for it, or a new one. It does not wait.

        Args:
            local_device, peer_device: network interfaces that are to be used, for RDMA.
            ib_port: of either.
            qp_num: queue pairs, for RDMA.
            min_bw: as ``100Gbps``; over RDMA a slower port is not taken. Other transports make nothing of it.
            transport: `auto`, or `shm`, `rdma` or `tcp`, of which nothing else will do then. `auto` takes shared memory
                within a machine, else RDMA where both sides have it, else TCP; the connection says which, and why.
            local_host: as given to the agent; there is one listener for all connections.

        Raises:
            TypeError: no alias.
            ValueError: the agent's own alias, or no such transport.
            PeerError: there is no such peer, or no way to it.
        """
        _peer(peer_alias)
        if peer_alias == self.alias:
            raise ValueError(f"peer_alias: {peer_alias!r} is this agent itself")
        if transport not in DEMANDS:
            raise ValueError(f"transport: {transport!r} is none of {', '.join(DEMANDS)}")
        if local_port or (
            local_host is not None and local_host not in (self._resource["host"]["address"], "127.0.0.1")
        ):
            raise ValueError(f"local_host, local_port: give local_host to start_peer_agent, or set {HOST_VARIABLE}")
        ib_port, qp_num = 1 if ib_port is None else ib_port, 1 if qp_num is None else qp_num
        _bandwidth(min_bw)
        for what, value, most in (("ib_port", ib_port, 255), ("qp_num", qp_num, 1024)):
            if not 1 <= whole_number(value, what) <= most:
                raise ValueError(f"{what}: {value} is not between 1 and {most}")
        return self._core.connections.connect(
            peer_alias,
            demand=transport,
            local_device=local_device,
            peer_device=peer_device,
            ib_port=ib_port,
            qp_num=qp_num,
            min_bw=min_bw,
        )

    def get_connections(self) -> dict[str, dict[str, PeerConnection]]:
        """Connections by peer and `conn_id`, the failed ones that nothing has taken the place of included."""
        found: dict[str, dict[str, PeerConnection]] = {}
        for conn in self._core.connections.all():
            found.setdefault(conn.peer_alias, {})[conn.conn_id] = conn
        return found

    def query_connection(
        self, peer_alias: str, *, local_nic: str | None = None, remote_nic: str | None = None
    ) -> PeerConnection | None:
        """The first connection with a peer, in the order of their `conn_id`; None if there is none."""
        for conn in self._core.connections.all():
            if (
                conn.peer_alias == peer_alias
                and local_nic in (None, conn.local_nic)
                and remote_nic in (None, conn.remote_nic)
            ):
                return conn
        return None

    # --- memory ------------------------------------------------------------------------------------------------

    def register_memory_region(
        self,
        mr_name: str,
        ptr: Any,
        offset: int = 0,
        length: int | None = None,
        *,
        writable: bool = True,
        fd: int | None = None,
        fd_offset: int = 0,
    ) -> int:
        """Offers memory to the peers of this scope, in the place of what had the name.

        When it returns, peers find it by its name, and what had the name before is out of their reach. Objects are kept
        alive while they are registered; what is behind a bare address is the caller's to keep.

        Args:
            mr_name: 1 to 200 characters.
            ptr: an object with the buffer protocol (bytearray, memoryview, mmap, a numpy array), a torch tensor, or the
                address of the first byte. Memory of `allocate_memory_region` or of `SharedMemory` is shared with peers
                of this machine; any other is reached by TCP or RDMA.
            offset: bytes from the beginning of an object. With an address it must be 0.
            length: bytes; left out, to the end of the object.
            writable: whether peers may write to it, too.
            fd: descriptor of the file or memfd that the memory is a mapping of, so that peers of this machine can map
                it; it is duplicated. `fd_offset` is where the object or address begins in it.

        Returns:
            A handle, for assignments.

        Raises:
            TypeError, ValueError: the name or the memory is none.
            PeerError: the peer-agent does not take it; then what had the name stays.
        """
        check_name(mr_name)
        if offset and is_address(ptr):
            # DLSlime adds it to the length and not to the address, though its examples pass a tensor's
            # storage_offset(), which data_ptr() has in it already. No reading of it makes every program right.
            raise ValueError(
                f"offset: it is {offset}, and with an address it must be 0: give the address of the first byte "
                "(data_ptr() of a tensor is that, whatever its storage_offset())"
            )
        memory = memory_of(ptr, offset, length)
        held: object = memory.held
        shared_fd, shared_offset = -1, 0
        if fd is not None:
            fd_offset = whole_number(fd_offset, "fd_offset")
            try:
                descriptor = Descriptor(os.dup(whole_number(fd, "fd")))
            except (OSError, OverflowError) as error:
                raise ValueError(f"fd: {fd} is no descriptor of this process ({error})") from None
            shared_fd, shared_offset, held = descriptor.fd, fd_offset + offset, (descriptor, memory.held)
        elif (found := shared_memory.shared_at(memory.address, memory.length)) is not None:
            whole, inside = found
            shared_fd, shared_offset, held = whole.fd, whole.offset + inside, (whole, memory.held)
        memory = Memory(memory.address, memory.length, memory.writable, memory.view, held)
        return self._core.register(mr_name, memory, writable=writable, fd=shared_fd, fd_offset=shared_offset).handle

    def allocate_memory_region(
        self, name: str, length: int, memory_kind: str = "shared", *, writable: bool = True
    ) -> PeerMemoryRegion:
        """New memory, all zeros, that peers of this machine copy from and to without asking; registered under *name*.

        Raises:
            ValueError: there is no such kind of memory here, or `length` is none.
            MemoryError: there is not so much.
        """
        check_name(name)
        if memory_kind != PeerMemoryRegion.memory_kind:
            raise ValueError(f"memory_kind: {memory_kind!r} cannot be had here; 'shared' can")
        memory = SharedMemory.allocate(whole_number(length, "length"), peers_write=writable)
        handle = self.register_memory_region(name, memory.view(), writable=writable)
        return PeerMemoryRegion(self, name, memory, handle)

    def unregister_memory_region(self, mr_name: str, *, handle: int | None = None) -> bool:
        """Ends a region; no peer reads or writes it any more when this returns.

        Args:
            handle: end it only if it is still this registration.

        Returns:
            False if nothing has that name.

        Raises:
            TypeError: the name is none; a handle goes with it, not in its place.
            PeerError: `timed_out`; a peer was stopped in the middle of a write to it, which may still end some day.
        """
        if not isinstance(mr_name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"mr_name: text is wanted, not {type(mr_name).__name__}")
        if handle is not None:
            region = self._core.regions.by_name.get(mr_name)
            if region is None or region.handle != handle:
                return False
        return self._core.unregister(mr_name)

    def get_mr_info(
        self, *names: str, peer_alias: str | None = None, mr_name: str | None = None
    ) -> dict[str, Any] | None:
        """What is known of a region: `get_mr_info("kv")` of one here, `get_mr_info("kv", peer_alias="b")` or
        `get_mr_info("b", "kv")` of a peer's.

        Returns:
            `{agent_name, mr_name, device, ib_port, link_type, addr, length, rkey, lkey, epoch, transports}`; None if
            there is no such region.
        """
        match names, peer_alias, mr_name:
            case (str() as peer, str() as name), None, None:
                pass
            case (str() as name,), peer, None:
                pass
            case (str() as peer,), None, str() as name:
                pass
            case (), peer, str() as name:
                pass
            case _:
                raise TypeError("get_mr_info: (name), (name, peer_alias=...) or (peer, name) is wanted")
        if peer is None or peer == self.alias:
            region = self._core.regions.by_name.get(name)
            if region is None:
                return None
            rkey = int(region.tokens.get("rdma", {}).get("rkey", 0))
            facts = first_port(self._resource, self._device)
            return _mr_info(
                self.alias, name, facts, region.address, region.length, rkey, region.epoch, sorted(region.tokens)
            )
        found = self._core.peer(peer)
        one = next((one for one in self._core.transfers.memories(peer) if one.name == name), None) if found else None
        if found is None or one is None:
            return None
        facts = (
            (found.device, found.ib_port, found.link_type)
            if found.link_type
            else first_port(found.resource, found.device)
        )
        return _mr_info(peer, name, facts, one.addr, one.length, one.rkey, one.epoch, sorted(one.transports))

    def get_handle(self, mr_name: str, peer_alias: str | None = None) -> int:
        """A number for a region, here or of a peer, for assignments. It stands for this registration and no later one.

        Raises:
            PeerError: there is no such region.
        """
        return self._core.transfers.handle(check_name(mr_name), peer_alias)

    # --- transfers ---------------------------------------------------------------------------------------------

    def read(
        self,
        peer_alias: str,
        assign: Assignments,
        stream: object = None,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
        epoch: Expected = None,
        checksum: Expected = None,
    ) -> TransferFuture:
        """Reads from a peer's memory into this process's.

        Args:
            assign: one assignment or a list of them: see :mod:`computemesh.peer.assignments`.
            stream: is there for programs that pass one; it must be None.
            epoch: what the peer's region must be a registration of, for all assignments or one for each.
            checksum: CRC-32 that the bytes of each assignment must have. What does not has been read all the same.

        Returns:
            A future. Its `wait()` returns 0 when all bytes are there, and raises when they are not; `epochs` tells the
            registrations that were read.

        Raises:
            PeerError: it cannot be begun, as when there is no connection (`not_connected`) or no such region, or the
                range leaves one.
            TypeError, ValueError: the assignments are none.
        """
        if stream is not None:
            _no_stream(stream)
        if epoch is None and checksum is None:
            future = self._transfer("read", peer_alias, assign, None, local_nic, remote_nic)
        else:
            future = self.begin("read", peer_alias, assign, local_nic, remote_nic, epoch, checksum)
        assert future is not None
        return future

    def write(
        self,
        peer_alias: str,
        assign: Assignments,
        stream: object = None,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
        epoch: Expected = None,
        checksum: Expected = None,
    ) -> TransferFuture:
        """Writes from this process's memory into a peer's. As `read`; it is done when the bytes are there.

        Args:
            checksum: CRC-32 that the bytes of each assignment must have before any is written.
        """
        if stream is not None:
            _no_stream(stream)
        if epoch is None and checksum is None:
            future = self._transfer("write", peer_alias, assign, None, local_nic, remote_nic)
        else:
            future = self.begin("write", peer_alias, assign, local_nic, remote_nic, epoch, checksum)
        assert future is not None
        return future

    def write_with_imm(
        self,
        peer_alias: str,
        assign: Assignments,
        imm_data: int = 0,
        stream: object = None,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
    ) -> TransferFuture:
        """As `write`; the peer gets a number after the bytes, from `imm_recv`.

        Args:
            imm_data: 32 bits, as a number with a sign or without one. `ImmFuture.imm_data` gives it with one, as
                DLSlime does: 2**32 - 1 arrives as -1.
        """
        _no_stream(stream)
        if isinstance(imm_data, bool) or not isinstance(imm_data, Integral):
            raise TypeError(f"imm_data: a whole number is wanted, not {type(imm_data).__name__}")
        if not IMM_MIN <= imm_data <= IMM_MAX:
            raise ValueError(f"imm_data: {imm_data} is not between {IMM_MIN} and {IMM_MAX}")
        future = self._core.transfers.transfer(
            "write", peer_alias, assign, imm=imm_data & 0xFFFFFFFF, local_nic=local_nic, remote_nic=remote_nic
        )
        assert future is not None
        return future

    def send(
        self,
        peer_alias: str,
        chunk: Any,
        stream: object = None,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
    ) -> MessageFuture:
        """Sends a message; done when the peer has it.

        Args:
            chunk: `(ptr, offset, length)` with an address or an object, or an object as it is. It must stay as it is
                until the future is done.
        """
        _no_stream(stream)
        conn = self._core.connections.connected(peer_alias, local_nic, remote_nic)
        return self._core.transfers.send(conn, _chunk(chunk))

    def recv(
        self,
        peer_alias: str,
        chunk: Any,
        stream: object = None,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
    ) -> MessageFuture:
        """Takes the next message of a peer; one that is too large fails, and is gone.

        Args:
            chunk: where it goes, as for `send`. The future's `received` is the number of its bytes.
        """
        _no_stream(stream)
        view = _chunk(chunk)
        if view.readonly:
            raise ValueError("chunk: it can only be read")
        conn = self._core.connections.connected(peer_alias, local_nic, remote_nic)
        return self._core.transfers.recv(conn, view)

    def imm_recv(
        self,
        peer_alias: str,
        stream: object = None,
        *,
        local_nic: str | None = None,
        remote_nic: str | None = None,
    ) -> ImmFuture:
        """Takes the next number that came with a peer's write, also one that came before. See `ImmFuture.imm_data`."""
        _no_stream(stream)
        return self._core.transfers.recv_imm(self._core.connections.connected(peer_alias, local_nic, remote_nic))

    def begin(
        self,
        kind: Literal["read", "write"],
        peer_alias: str,
        assign: Assignments,
        local_nic: str | None = None,
        remote_nic: str | None = None,
        epoch: Expected = None,
        checksum: Expected = None,
        *,
        cached_only: bool = False,
    ) -> TransferFuture | None:
        """Both `read` and `write`; with `cached_only`, None where the peer-agent would have to be asked first."""
        count = len(assign) if assign and isinstance(assign[0], (list, tuple)) else 1
        return self._core.transfers.transfer(
            kind,
            peer_alias,
            assign,
            local_nic=local_nic,
            remote_nic=remote_nic,
            epochs=_each("epoch", epoch, count),
            checksums=_each("checksum", checksum, count),
            cached_only=cached_only,
        )

    # --- the end -----------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counts of this agent.

        Returns:
            `{regions, connections: {connecting, connected, failed}, under_way, failed: {code: futures},` and for each
            transport that can be used here `shm, rdma, tcp: {reads, writes, bytes_read, bytes_written}}`: orders of
            this process and their bytes. An order that needs two transports counts in both. `tcp` has
            besides `links, lost, strangers, breaches, refused_{code}`, and `rdma` `links, refused`: what peers did.
        """
        return self._core.stats()

    def shutdown(self) -> None:
        """Ends the agent: its memory is out of reach, its connections end, its alias is free. Twice is fine."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None:
            with contextlib.suppress(Exception):  # At the end of the interpreter anything may be gone.
                core.close()


def start_peer_agent(
    nanoctrl_url: str | os.PathLike[str] | None = None,
    alias: str | None = None,
    device: str | None = None,
    scope: str | None = None,
    *,
    ctrl_url: str | None = None,
    address: str | None = None,
    name_prefix: str = "agent",
    local_host: str | None = None,
) -> PeerAgent:
    """Takes part as a peer, through the peer-agent of this machine.

    Args:
        nanoctrl_url: left out, or a path: the peer-agent's socket; left out, ``COMPUTEMESH_PEER_SOCKET``, else that of
            the mesh in ``COMPUTEMESH_HOME``. With `http://HOST:3000`, or `HOST:3000`, the control plane there must know
            this peer afterwards, and with `nats://HOST:PORT` that must be the bus: a program that was told of another
            mesh than its machine belongs to hears of it. `ctrl_url` and `address` are other names of it.
        alias: what it is to be called; left out, the control plane finds `{name_prefix}-{number}`.
        device: the network interface it prefers, as `mlx5_0`.
        scope: a space of names; peers of other scopes neither see this one nor reach it.
        local_host: this machine's address on the network over which peers of other machines reach it by TCP, else
            ``COMPUTEMESH_PEER_HOST``. Without it, it listens on loopback only.

    Raises:
        PeerError: there is no peer-agent (`no_agent`), the alias is taken (`alias_taken`), or it is another mesh's.
        ValueError: the alias or the scope is none.
    """
    return PeerAgent(
        nanoctrl_url,
        alias,
        device,
        scope,
        ctrl_url=ctrl_url,
        address=address,
        name_prefix=name_prefix,
        local_host=local_host,
    )


def default_endpoints(device: str | None, local_host: str | None) -> list[Endpoint]:
    """The transports of this process."""
    return [ShmEndpoint(), RdmaEndpoint(device), TcpEndpoint(local_host)]


def _mr_info(
    agent: str,
    name: str,
    nic: tuple[str, int, str],
    addr: int,
    length: int,
    rkey: int,
    epoch: int,
    transports: Sequence[str],
) -> dict[str, Any]:
    device, ib_port, link_type = nic
    return {
        "agent_name": agent,
        "mr_name": name,
        "device": device,
        "ib_port": ib_port,
        "link_type": link_type,
        "addr": addr,
        "length": length,
        "rkey": rkey,
        "lkey": 0,
        "epoch": epoch,
        "transports": list(transports),
    }


def _chunk(chunk: Any) -> memoryview:
    if isinstance(chunk, tuple):
        if len(chunk) != 3:  # pyright: ignore[reportUnknownArgumentType]
            raise TypeError("chunk: (ptr, offset, length) is wanted")
        memory = memory_of(*chunk, field="chunk")  # pyright: ignore[reportUnknownArgumentType]
    elif is_address(chunk):
        raise TypeError("chunk: (ptr, offset, length) is wanted with an address")
    else:
        memory = memory_of(chunk, field="chunk")
    if memory.view is None:
        raise PeerError(NO_WAY, "chunk: messages are sent from and received into memory that the processor can read")
    return memory.view


def _each(field: str, expected: Expected, count: int) -> Sequence[int | None] | None:
    if expected is None:
        return None
    if isinstance(expected, (list, tuple)):
        return [None if one is None else whole_number(one, field) for one in expected]
    return [whole_number(expected, field)] * count


def _no_stream(stream: object) -> None:
    if stream is not None:
        raise ValueError("stream: transfers take part in no stream of a device; pass None")


def _peer(alias: object) -> None:
    if not isinstance(alias, str) or not alias:
        raise TypeError("peer_alias: a peer's alias is wanted, and it must not be empty")


def _bandwidth(min_bw: object) -> None:
    if min_bw is not None and not isinstance(min_bw, str):
        raise TypeError(f"min_bw: text is wanted, not {type(min_bw).__name__}")
    if min_bw:
        gbps(min_bw)


def _checked(field: str, value: str, kind: Any) -> str:
    if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{field}: text is wanted, not {type(value).__name__}")
    try:
        return cast(str, msgspec.convert(value, kind))
    except msgspec.ValidationError:
        about = next(one for one in get_args(kind)[1:] if isinstance(one, msgspec.Meta)).description
        raise ValueError(f"{field}: {value[:80]!r} is none. {about}") from None
