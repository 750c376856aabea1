"""Transfers that somebody orders over the bus."""

from __future__ import annotations

import logging
import time
from typing import Final, get_args

from computemesh.contracts.peers import Piece, Transfer, TransferBegun, Transferred, Transport
from computemesh.peer.assignments import Wanted
from computemesh.peer.attachment import Attachment
from computemesh.peer.errors import OUT_OF_RANGE, TIMED_OUT, PeerError
from computemesh.peer.signals import Begun, Ended
from computemesh.peer.transfers import Transfers

logger: Final = logging.getLogger(__name__)


class Orders:
    """Does what peers of this process are told to do."""

    def __init__(self, life: Attachment, transfers: Transfers) -> None:
        self._life = life
        self._transfers = transfers

    def begin(self, transfer: Transfer) -> Begun:
        for number, piece in enumerate(transfer.pieces):
            region = self._transfers.regions.get(piece.local)
            if piece.local_offset + piece.length > region.length:
                raise PeerError(
                    OUT_OF_RANGE,
                    f"pieces[{number}]: {piece.length} bytes from {piece.local_offset} on leave {piece.local!r}, "
                    f"which has {region.length}",
                )
        self._life.spawn("order", lambda: self._life.signals.tell(Ended(outcome=self.run(transfer))))
        return Begun(body=TransferBegun(transfer_id=transfer.transfer_id, state="running"))

    def run(self, transfer: Transfer) -> Transferred:
        """Does what was ordered, and says how it ended. Blocks."""
        begun = time.monotonic()
        deadline = begun + transfer.timeout_s
        moved, sums = 0, list[str]()
        epochs: tuple[int, ...] = ()
        transports: list[Transport] = []
        code = reason = ""
        try:
            conn = self._transfers.connections.ready.get(transfer.peer) or self._transfers.connections.connect(
                transfer.peer, timeout_s=transfer.timeout_s
            )
            conn.wait(max(0.0, deadline - time.monotonic()))
            wanted = [_wanted(piece) for piece in transfer.pieces]
            future = self._transfers.transfer(
                transfer.kind,
                transfer.peer,
                [tuple(one) for one in wanted],
                epochs=[piece.epoch for piece in transfer.pieces],
                checksums=[None if piece.checksum is None else int(piece.checksum, 16) for piece in transfer.pieces],
            )
            assert future is not None
            epochs = future.epochs
            future.wait(max(0.0, deadline - time.monotonic()))
            transports = [link for link in get_args(Transport) if link in future.transport.split("+")]
            moved = sum(piece.length for piece in transfer.pieces)
            if transfer.checksums:
                sums = [f"{self._transfers.checksum(one):08x}" for one in wanted]
        except TimeoutError:
            code, reason = TIMED_OUT, f"not done after {transfer.timeout_s:g} s"
        except PeerError as error:
            code, reason = error.code, error.reason
        except Exception as error:
            logger.exception("transfer %s failed", transfer.transfer_id)
            code, reason = "failed", f"{type(error).__name__}: {error}"
        return Transferred(
            transfer_id=transfer.transfer_id,
            node_id=self._life.node_id,
            scope=self._life.scope,
            alias=self._life.alias,
            peer=transfer.peer,
            kind=transfer.kind,
            ok=not code,
            bytes=moved,
            seconds=time.monotonic() - begun,
            transports=transports,
            epochs=list(epochs),
            checksums=sums,
            code=code,
            reason=reason[:200],
            at=time.time(),
        )


def _wanted(piece: Piece) -> Wanted:
    remote = piece.local if piece.remote is None else piece.remote
    return Wanted(piece.local, remote, piece.local_offset, piece.remote_offset, piece.length)
