"""What tells this machine from others."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Final

FILES: Final = ("etc/machine-id", "var/lib/dbus/machine-id", "sys/class/dmi/id/product_uuid")
"""Where Linux keeps a number of its own for the machine, or the installation; the first that can be read counts."""

_PURPOSE: Final = b"computemesh machine id"


def machine_id(*, root: Path = Path("/")) -> str:
    """A name for this machine that stays the same, and from which its own number cannot be told; 32 hex digits.

    Where no such number can be read it follows from the address of a network card; empty if there is none
    either.
    """
    own = next((text for text in map(_text, (root / name for name in FILES)) if text), "")
    return hashlib.blake2b(own.encode(), key=_PURPOSE, digest_size=16).hexdigest() if own else _by_network_card()


def _by_network_card() -> str:
    address = uuid.getnode()
    if address >> 40 & 1:  # Without a card Python makes up a number, which this bit tells.
        return ""
    return hashlib.blake2b(f"{address:x}".encode(), key=_PURPOSE, digest_size=16).hexdigest()


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
    return "" if text == "uninitialized" else text  # As systemd leaves it in images.
