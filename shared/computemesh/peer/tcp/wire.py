"""What goes over the sockets of a link. Numbers are little-endian; everything here is plain computation.

A link is made of *lanes*. A lane is one socket with one side that asks and one that answers, in the order of the
questions; so a link of n lanes has 2 n sockets, n for the orders of either side. Lane 0 takes what is small, and
messages; the others take what is large.

Beginning, on each socket, by the side that dialled it (`D`) and the one that listened (`L`)::

    D  magic "CMPT", version u16, lane u8, asker u8 (0: D asks on this socket, 1: L), SHA-256 of the link's name,
       32 random bytes, proof 1                                                                       104 bytes
    L  32 random bytes, proof 2                                                                        64 bytes
    D  proof 3                                                                                         32 bytes

A proof is an HMAC-SHA256 with the link's key over its number and everything before it. `L` says nothing before it has
seen proof 1, and takes each lane once, so what was overheard is of no use. What follows is neither sealed nor signed:
a data network is one that nobody else writes to.

A question is a header, its pieces, and what it brings::

    kind u8, flags u8, pieces u16, imm u32, number u64, length u64                                     24 bytes
    a piece: handle u64, epoch u64, offset u64, length u64                                             32 bytes

    READ      pieces                       the answer brings their bytes
    WRITE     pieces, length bytes         flag 1: imm is to be told once they are in memory
    MESSAGE   length bytes                 flag 2: only announced, it brings none. Its id is the next from 1 on
    PULL      one piece                    of the message that was announced under this handle
    FINISH    imm: status, length: id      what became of a message that was held
    IMM       imm                          as a WRITE of nothing
    PING

An answer is one frame, or for what is large several; each is followed by `length` bytes, one with a status by none::

    status u16, more u16 (1: another frame follows), length u32, number u64                            16 bytes

Numbers count the questions of a lane from 1 on, and show that both sides are at the same place.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from computemesh.peer.transport import NO_REGION, OUT_OF_RANGE, READ_ONLY, STALE_EPOCH, TOO_LARGE, LocalRegion

VERSION: Final = 1
MAGIC: Final = b"CMPT"
LANES_MAX: Final = 16
NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
HELLO: Final = struct.Struct("<4sHBB32s32s")
HELLO_BYTES: Final = HELLO.size + PROOF_BYTES
CHALLENGE_BYTES: Final = NONCE_BYTES + PROOF_BYTES

QUESTION: Final = struct.Struct("<BBHIQQ")
PIECE: Final = struct.Struct("<QQQQ")
READ_ONE: Final = struct.Struct("<BBHIQQQQQQ")
"""A question with one piece, as most are."""
FRAME: Final = struct.Struct("<HHIQ")

READ: Final = 1
WRITE: Final = 2
MESSAGE: Final = 3
PULL: Final = 4
FINISH: Final = 5
IMM: Final = 6
PING: Final = 7

WITH_IMM: Final = 1
ANNOUNCED: Final = 2

PIECES_MAX: Final = 256
"""In one question."""
EAGER_MAX: Final = 64 * 1024
"""A longer message is announced, and pulled by the peer once there is a `recv` for it."""
FRAME_MAX: Final = 1024 * 1024
LENGTH_MAX: Final = 2**62

NO_ROOM: Final = "no_room"
"""The peer keeps more numbers than it wants to, and takes none until somebody asks for them."""

HELD: Final = 100
"""Not an end: the message waits for a `recv`, and the end is told by FINISH."""
CODES: Final = ("", NO_REGION, STALE_EPOCH, OUT_OF_RANGE, READ_ONLY, TOO_LARGE, NO_ROOM)
"""By status."""
STATUS: Final = {code: status for status, code in enumerate(CODES)}
REASONS: Final = {
    NO_REGION: "the peer has no such region",
    STALE_EPOCH: "the region has been registered again, or no longer is",
    OUT_OF_RANGE: "the range reaches beyond the region",
    READ_ONLY: "the region may only be read",
    TOO_LARGE: "the message is larger than the buffer it was to go into",
    NO_ROOM: "the peer keeps too many numbers that nobody has asked for",
}


class Malformed(Exception):
    """The peer does not speak this protocol; the connection cannot go on."""


# --- beginning --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello:
    """Which lane of which link a socket is to be, as the side says that dialled it."""

    link: bytes
    """SHA-256 of its name."""
    lane: int
    dialler_asks: bool
    body: bytes
    """What proofs are over."""
    proof: bytes


def link_digest(link: str) -> bytes:
    return hashlib.sha256(link.encode()).digest()


def prove(key: bytes, number: int, *said: bytes) -> bytes:
    return hmac.digest(key, bytes((number,)) + b"".join(said), "sha256")


def pack_hello(link: str, key: bytes, lane: int, dialler_asks: bool, nonce: bytes) -> bytes:
    body = HELLO.pack(MAGIC, VERSION, lane, 0 if dialler_asks else 1, link_digest(link), nonce)
    return body + prove(key, 1, body)


def parse_hello(raw: bytes) -> Hello | None:
    """None when it is none of this version."""
    if len(raw) != HELLO_BYTES:
        return None
    magic, version, lane, asker, link, _ = HELLO.unpack_from(raw)
    if magic != MAGIC or version != VERSION or lane >= LANES_MAX or asker > 1:
        return None
    return Hello(link=link, lane=lane, dialler_asks=asker == 0, body=raw[: HELLO.size], proof=raw[HELLO.size :])


def proven(key: bytes, proof: bytes, number: int, *said: bytes) -> bool:
    return hmac.compare_digest(proof, prove(key, number, *said))


# --- questions --------------------------------------------------------------------------------------------------

Piece = tuple[int, int, int, int]
"""Handle, epoch, offset, length."""


def check_question(kind: int, flags: int, pieces: int, number: int, length: int, expected: int) -> None:
    """Refuses a header that no peer of this version sends.

    Raises:
        Malformed: it is one.
    """
    if kind == READ:
        sound = not flags and 0 < pieces <= PIECES_MAX and not length
    elif kind == WRITE:
        sound = not flags & ~WITH_IMM and 0 < pieces <= PIECES_MAX and length <= LENGTH_MAX
    elif kind == MESSAGE:
        sound = not flags & ~ANNOUNCED and not pieces and length <= (LENGTH_MAX if flags else EAGER_MAX)
    elif kind == PULL:
        sound = not flags and pieces == 1 and not length
    elif kind == FINISH:
        sound = not flags and not pieces
    else:
        sound = kind in (IMM, PING) and not flags and not pieces and not length
    if not sound:
        raise Malformed(f"a question of kind {kind} has flags {flags}, {pieces} pieces and {length} bytes")
    if number != expected:
        raise Malformed(f"question {number} came where {expected} was to come")


def check_piece(
    region: LocalRegion | None, epoch: int, offset: int, length: int, *, write: bool, latest_epoch: int = 0
) -> str:
    """Whether a peer may read or write this: empty, or the code of the refusal.

    `latest_epoch` is that of the last region that was exposed: what asks for one up to there asks for one that was.
    """
    if region is None:
        return STALE_EPOCH if 0 < epoch <= latest_epoch else NO_REGION
    if not region.live or region.epoch != epoch:
        return STALE_EPOCH
    if write and not region.writable:
        return READ_ONLY
    if offset + length > region.length:
        return OUT_OF_RANGE
    return ""


def cut(spans: Sequence[tuple[int, int]], parts: int) -> list[list[tuple[int, int, int]]]:
    """Deals ranges of bytes out in parts of about equal size, in their order.

    Args:
        spans: an index and a length each.
        parts: how many; there are fewer when there are not so many bytes.

    Returns:
        For each part the index, the offset in its range, and the length.
    """
    total = sum(length for _, length in spans)
    share = max(1, -(-total // parts))
    dealt: list[list[tuple[int, int, int]]] = [[]]
    room = share
    for index, length in spans:
        offset = 0
        while True:
            if room == 0 and offset < length:
                dealt.append([])
                room = share
            taken = min(room, length - offset)
            dealt[-1].append((index, offset, taken))
            room -= taken
            offset += taken
            if offset == length:
                break
    return dealt
