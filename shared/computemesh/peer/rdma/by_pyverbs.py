"""Verbs by ``pyverbs`` of rdma-core, which distributions have as a package of the system (``python3-pyverbs``)."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

from computemesh.peer.rdma.by_ibverbs import ACTIVE, ETHERNET, RETRIES, TIMEOUT
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

LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ = 1, 2, 4
SIGNALED: Final = 2
WITH_IMM: Final = 2
OPCODES: Final[dict[WorkKind, int]] = {"write": 0, "write_imm": 1, "send": 2, "read": 4}
RC: Final = 2
ACCESS_FLAGS: Final = 8

_opening = threading.Lock()


def verbs() -> Verbs:
    """Raises ImportError where there is none."""
    for name in ("device", "pd", "mr", "cq", "qp", "addr", "wr"):
        importlib.import_module(f"pyverbs.{name}")
    return _Verbs(importlib.import_module("pyverbs"))


class _Verbs:
    name = "pyverbs"

    def __init__(self, pyverbs: Any) -> None:
        self._pv = pyverbs

    def devices(self) -> list[str]:
        try:
            return [device.name.decode() for device in self._pv.device.get_device_list()]
        except self._pv.pyverbs_error.PyverbsError:  # the kernel has no RDMA
            return []

    def open(self, device: str) -> Device:
        with _os_errors(self._pv):
            return _Device(self._pv, device)


class _Device:
    def __init__(self, pv: Any, name: str) -> None:
        self.name = name
        self._pv = pv
        self._context = pv.device.Context(name=name)
        self._domain = pv.pd.PD(self._context)
        self.reads = max(1, min(16, int(self._context.query_device().max_qp_rd_atom)))

    def port(self, number: int) -> PortFacts:
        with _os_errors(self._pv):
            found = self._context.query_port(number)
            return PortFacts(
                active=int(found.state) == ACTIVE,
                mtu=int(found.active_mtu),
                lid=int(found.lid),
                ethernet=int(found.link_layer) == ETHERNET,
            )

    def gid(self, port: int, index: int) -> bytes:
        with _os_errors(self._pv):
            return socket.inet_pton(socket.AF_INET6, str(self._context.query_gid(port, index).gid))

    def register(self, address: int, length: int, access: Access) -> Memory:
        with _os_errors(self._pv):
            return _Memory(self._pv, self._pv.mr.MR(self._domain, length, _flags(access), address=address))

    def register_gpu(self, address: int, length: int, access: Access) -> Memory:
        """By the kernel module nvidia_peermem alone: what this library knows of dmabuf, it has from GPUs of its own."""
        return self.register(address, length, access)

    def completions(self, depth: int) -> Completions:
        with _os_errors(self._pv), _opening:
            before = _channels()
            channel = self._pv.cq.CompChannel(self._context)
            (fd,) = _channels() - before
            return _Completions(self._pv, channel, self._pv.cq.CQ(self._context, depth, None, channel, 0), fd)

    def pair(self, completions: Completions, *, port: int, sends: int, receives: int) -> Pair:
        assert isinstance(completions, _Completions)
        with _os_errors(self._pv):
            qp, queue = self._pv.qp, completions.queue
            room = qp.QPCap(max_send_wr=sends, max_recv_wr=receives, max_send_sge=1, max_recv_sge=1)
            terms = qp.QPInitAttr(qp_type=RC, scq=queue, rcq=queue, cap=room, sq_sig_all=0)
            attributes = qp.QPAttr(port_num=port)
            attributes.qp_access_flags = 0
            return _Pair(self._pv, qp.QP(self._domain, terms, attributes))

    def close(self) -> None:
        with _os_errors(self._pv):
            self._domain.close()
            self._context.close()


class _Memory:
    def __init__(self, pv: Any, memory: Any) -> None:
        self._pv = pv
        self._memory = memory
        self.lkey = int(memory.lkey)
        self.rkey = int(memory.rkey)

    def close(self) -> None:
        with _os_errors(self._pv):
            self._memory.close()


class _Completions:
    def __init__(self, pv: Any, channel: Any, queue: Any, fd: int) -> None:
        self._pv = pv
        self._channel = channel
        self.queue = queue
        self.fd = fd

    def arm(self) -> None:
        self.queue.req_notify()

    def hush(self) -> None:
        self._channel.get_cq_event(self.queue)
        self.queue.ack_events(1)

    def poll(self, most: int) -> list[Finished]:
        _, found = self.queue.poll(most)
        return [
            Finished(
                wc.wr_id,
                int(wc.status),
                wc.byte_len,
                socket.ntohl(wc.imm_data) if not wc.status and wc.wc_flags & WITH_IMM else None,
            )
            for wc in found
        ]

    def close(self) -> None:
        with _os_errors(self._pv):
            self.queue.close()
            self._channel.close()


class _Pair:
    def __init__(self, pv: Any, pair: Any) -> None:
        self._pv = pv
        self._pair = pair
        self.number = int(pair.qp_num)

    def connect(self, remote: Remote, *, port: int, gid_index: int, psn: int, reads: int) -> None:
        with _os_errors(self._pv):
            gid = self._pv.addr.GID(remote.gid.hex(":", 2))
            attributes = self._pv.qp.QPAttr(port_num=port)
            attributes.dest_qp_num = remote.number
            attributes.path_mtu = remote.mtu
            attributes.rq_psn = remote.psn
            attributes.sq_psn = psn
            attributes.max_rd_atomic = attributes.max_dest_rd_atomic = reads
            attributes.min_rnr_timer = 12
            attributes.timeout = TIMEOUT
            attributes.retry_cnt = RETRIES
            attributes.rnr_retry = RETRIES
            route = self._pv.addr.GlobalRoute(dgid=gid, sgid_index=gid_index, hop_limit=64)
            attributes.ah_attr = self._pv.addr.AHAttr(gr=route, is_global=1, port_num=port, dlid=remote.lid)
            self._pair.to_rts(attributes)

    def allow(self) -> None:
        with _os_errors(self._pv):
            attributes = self._pv.qp.QPAttr()
            attributes.qp_access_flags = _flags(Access(remote_read=True, remote_write=True))
            self._pair.modify(attributes, ACCESS_FLAGS)

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
        parts = [self._pv.wr.SGE(address, length, lkey)]  # the library wants one, also of no bytes
        request = self._pv.wr.SendWR(
            wr_id=work,
            opcode=OPCODES[kind],
            num_sge=1,
            imm_data=socket.htonl(imm),
            send_flags=SIGNALED,
            sg=parts,
        )
        if kind != "send":
            request.set_wr_rdma(rkey, remote_address)
        with _os_errors(self._pv):
            self._pair.post_send(request)

    def receive(self, work: int, address: int, length: int, lkey: int) -> None:
        request = self._pv.wr.RecvWR(wr_id=work, num_sge=1, sg=[self._pv.wr.SGE(address, length, lkey)])
        with _os_errors(self._pv):
            self._pair.post_recv(request)

    def close(self) -> None:
        with _os_errors(self._pv):
            self._pair.close()


def _flags(access: Access) -> int:
    return (
        LOCAL_WRITE * (access.local_write or access.remote_write)
        | REMOTE_READ * access.remote_read
        | REMOTE_WRITE * access.remote_write
    )


def _channels() -> set[int]:
    """The open completion channels; the library does not tell the descriptor of one."""
    found: set[int] = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if "infinibandevent" in str(link.readlink()):
                found.add(int(link.name))
    return found


@contextlib.contextmanager
def _os_errors(pv: Any) -> Generator[None]:
    try:
        yield
    except pv.pyverbs_error.PyverbsError as error:
        number = int(getattr(error, "error_code", 0)) or errno.EIO
        raise OSError(number, f"{error} ({os.strerror(number)})") from error
