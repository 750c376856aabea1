"""What tells a machine from others."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Final

FILES: Final = ("etc/machine-id", "var/lib/dbus/machine-id", "sys/class/dmi/id/product_uuid")
"""Where Linux keeps a number of its own for the machine, or the installation; the first that can be read counts."""

_PURPOSE: Final = b"computemesh machine id"


def machine_id(home: Path, *, root: Path = Path("/")) -> str:
    """A name for this machine that stays the same, and from which its own number cannot be told; 32 hex digits.

    Two homes on one machine are two machines to the mesh: each has a detector and an agent of its own. Where the
    machine's number cannot be read the address of a network card stands for it; empty if there is none either.
    """
    own = next((text for text in map(_text, (root / name for name in FILES)) if text), "") or _network_card()
    said = f"{own}\0{home}".encode(errors="surrogateescape")
    return hashlib.blake2b(said, key=_PURPOSE, digest_size=16).hexdigest() if own else ""


def _network_card() -> str:
    address = uuid.getnode()
    return "" if address >> 40 & 1 else f"{address:x}"  # Without a card Python makes up a number; this bit tells.


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
    return "" if text == "uninitialized" else text  # As systemd leaves it in images.
