"""Verbs by ``ibverbs`` of the Python package index, which needs the system's libibverbs."""

from __future__ import annotations

import importlib
from typing import Any

from computemesh.peer.rdma.verbs import (
    Access,
    Completions,
    Device,
    Finished,
    Memory,
    Pair,
    PortFacts,
    Remote,
    Verbs,
    WorkKind,
)

ETHERNET = 2
ACTIVE = 4

# How long the peer may take to answer: 2**17 * 4.096 µs, on some interfaces four times that. With six retries a dead
# peer is noticed within seconds, while one on a crowded machine is not given up. Seven means "for ever" to soft-RoCE.
TIMEOUT = 17
RETRIES = 6


def verbs() -> Verbs:
    """Raises ImportError where the package or the system's library is missing."""
    return _Verbs(importlib.import_module("ibverbs"))


class _Verbs:
    name = "ibverbs"

    def __init__(self, ib: Any) -> None:
        self._ib = ib

    def devices(self) -> list[str]:
        try:
            return [str(device.name) for device in self._ib.get_device_list()]
        except OSError:  # the kernel has no RDMA
            return []

    def open(self, device: str) -> Device:
        for found in self._ib.get_device_list():
            if found.name == device:
                return _Device(self._ib, found.open(), device)
        raise OSError(f"there is no device {device!r}")


class _Device:
    def __init__(self, ib: Any, context: Any, name: str) -> None:
        self.name = name
        self._ib = ib
        self._context = context
        self._domain = context.alloc_pd()
        self.reads = max(1, min(16, int(context.query_device().max_qp_rd_atom)))

    def port(self, number: int) -> PortFacts:
        found = self._context.query_port(number)
        return PortFacts(
            active=int(found.state) == ACTIVE,
            mtu=int(found.active_mtu),
            lid=int(found.lid),
            ethernet=int(found.link_layer) == ETHERNET,
        )

    def gid(self, port: int, index: int) -> bytes:
        return bytes(self._context.query_gid(port, index).raw)

    def register(self, address: int, length: int, access: Access) -> Memory:
        return _Memory(self._domain.reg_mr(address, length, _flags(self._ib, access)))

    def register_gpu(self, address: int, length: int, access: Access) -> Memory:
        cuda: Any = importlib.import_module("ibverbs.cuda")
        try:
            return _Memory(cuda.register_tensor(self._domain, _Tensor(address, length), _flags(self._ib, access)))
        except RuntimeError as error:
            raise OSError(str(error)) from error

    def completions(self, depth: int) -> Completions:
        channel = self._context.create_comp_channel()
        return _Completions(channel, self._context.create_cq(depth, channel))

    def pair(self, completions: Completions, *, port: int, sends: int, receives: int) -> Pair:
        assert isinstance(completions, _Completions)
        queue = completions.queue
        terms = self._ib.QPInitAttr(
            send_cq=queue, recv_cq=queue, qp_type=self._ib.QPType.RC, max_send_wr=sends, max_recv_wr=receives
        )
        pair = self._domain.create_qp(terms)
        pair.to_init(port, 0)
        return _Pair(self._ib, pair)

    def close(self) -> None:
        self._domain.close()
        self._context.close()


class _Tensor:
    """As `register_tensor` wants to be shown memory of a GPU."""

    is_cuda = True

    def __init__(self, address: int, nbytes: int) -> None:
        self._address = address
        self.nbytes = nbytes

    def data_ptr(self) -> int:
        return self._address


class _Memory:
    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.lkey = int(memory.lkey)
        self.rkey = int(memory.rkey)

    def close(self) -> None:
        self._memory.close()


class _Completions:
    def __init__(self, channel: Any, queue: Any) -> None:
        self._channel = channel
        self.queue = queue
        self.fd = int(channel.fd)

    def arm(self) -> None:
        self.queue.req_notify()

    def hush(self) -> None:
        self._channel.get_cq_event()
        self.queue.ack_events(1)

    def poll(self, most: int) -> list[Finished]:
        return [
            Finished(wc.wr_id, int(wc.status), wc.byte_len, wc.imm_data if wc.wc_flags & 2 else None)
            for wc in self.queue.poll(most)
        ]

    def close(self) -> None:
        self.queue.close()
        self._channel.close()


class _Pair:
    def __init__(self, ib: Any, pair: Any) -> None:
        self._ib = ib
        self._pair = pair
        self.number = int(pair.qp_num)
        codes = ib.WROpcode
        self._codes: dict[WorkKind, int] = {
            "read": int(codes.RDMA_READ),
            "write": int(codes.RDMA_WRITE),
            "write_imm": int(codes.RDMA_WRITE_WITH_IMM),
            "send": int(codes.SEND),
        }
        self._signaled = int(ib.SendFlags.SIGNALED)

    def connect(self, remote: Remote, *, port: int, gid_index: int, psn: int, reads: int) -> None:
        peer = self._ib.QPInfo(
            qp_num=remote.number, psn=remote.psn, lid=remote.lid, gid=remote.gid, port=port, mtu=remote.mtu
        )
        self._pair.to_rtr(
            peer, sgid_index=gid_index, mtu=remote.mtu, hop_limit=64, min_rnr_timer=12, max_dest_rd_atomic=reads
        )
        self._pair.to_rts(psn, timeout=TIMEOUT, retry_cnt=RETRIES, rnr_retry=RETRIES, max_rd_atomic=reads)

    def allow(self) -> None:
        flags = _flags(self._ib, Access(remote_read=True, remote_write=True))
        self._pair.modify(int(self._ib.QPAttrMask.ACCESS_FLAGS), qp_access_flags=flags)

    def post(
        self,
        kind: WorkKind,
        work: int,
        address: int,
        length: int,
        lkey: int,
        remote_address: int = 0,
        rkey: int = 0,
        imm: int = 0,
    ) -> None:
        parts = [self._ib.SGE(address, length, lkey)] if length else []
        self._pair.post_send(self._ib.SendWR(work, parts, self._codes[kind], self._signaled, remote_address, rkey, imm))

    def receive(self, work: int, address: int, length: int, lkey: int) -> None:
        self._pair.post_recv(self._ib.RecvWR(work, [self._ib.SGE(address, length, lkey)]))

    def close(self) -> None:
        self._pair.close()


def _flags(ib: Any, access: Access) -> int:
    flags = ib.AccessFlags
    return int(
        (flags.LOCAL_WRITE if access.local_write or access.remote_write else 0)
        | (flags.REMOTE_READ if access.remote_read else 0)
        | (flags.REMOTE_WRITE if access.remote_write else 0)
    )
