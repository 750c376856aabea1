"""What the head of a GGUF file says of the model in it.

The format is ggml's (docs/gguf.md in its repository), versions 2 and 3, little-endian: counts, then keys with typed
values, then a line for each tensor, then the tensors themselves. Nothing here reads those. The bytes may come from
anybody: every count is bounded before it is believed, and what cannot be right is refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)

HEAD_BYTES_MAX: Final = 256 * 1024 * 1024
"""Of keys, values and the list of tensors. The vocabulary is among the values, so real ones have several MiB."""

FIRST_READ_BYTES: Final = 1024 * 1024
"""What is read of a file at first; four times as much as long as its head goes on."""

KEYS_MAX: Final = 65_536
KEY_BYTES_MAX: Final = 65_535
TENSORS_MAX: Final = 1_000_000
DIMENSIONS_MAX: Final = 4
STRINGS_MAX: Final = 4_000_000
"""Strings in arrays, all together."""
KEPT_MAX: Final = 1024
"""Arrays of numbers up to this length are kept; of longer ones, and of those of strings, only the length."""
ARRAY_DEPTH_MAX: Final = 4

Scalar = bool | int | float | str
Value = Scalar | tuple[bool | int | float, ...]


class GgufError(Exception):
    """This is no GGUF file that can be used; the message says why, without the file's name."""


class HeadCut(GgufError):
    """The bytes end before the head does."""


class Pooling(IntEnum):
    """How an embedding comes from what the model says of each token."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4
    """It ranks documents instead."""


_EMBEDS: Final = frozenset({Pooling.MEAN, Pooling.CLS, Pooling.LAST})

_ENCODERS: Final = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "llama-embed",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)
"""Architectures that cannot write texts."""

TENSOR_TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Name, numbers in a block and bytes of a block, by ggml's number of the type. The size of others is not known."""

FILE_TYPES: Final[Mapping[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
    40: "Q1_0",
}
"""What ``general.file_type`` says of the file as a whole."""

_ARRAY: Final = 9
_STRING: Final = 8
_BOOL: Final = 7
_NUMBERS: Final[Mapping[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32: Final = _NUMBERS[4]
_U64: Final = _NUMBERS[10]


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """The head of a GGUF file, or of all files of a model in parts together."""

    version: int
    values: Mapping[str, Value] = field(repr=False)
    """By key: numbers, texts, and short arrays of numbers."""
    lengths: Mapping[str, int] = field(repr=False)
    """Elements of each array, by key."""
    tensors: int
    parameters: int
    """Numbers in all tensors."""
    data_bytes: int | None
    """Least size of the file: up to the end of its last tensor. None when the size of a tensor's type is not known."""
    tensor_types: Mapping[str, int]
    """Numbers in the tensors of each type, by the type's name."""
    size_bytes: int = 0
    """Of the file, or of all files together."""

    @property
    def architecture(self) -> str:
        """Such as ``llama``; empty when it is not told."""
        return self._text("general.architecture")

    @property
    def name(self) -> str:
        return self._text("general.name")

    @property
    def kind(self) -> str:
        """``model``, or what it is instead: ``adapter``, ``mmproj`` (an image projector), ``imatrix``."""
        return self._text("general.type") or ("mmproj" if self.architecture == "clip" else "model")

    @property
    def context_tokens(self) -> int | None:
        """Longest text it was trained for, prompt and answer together."""
        return self.number("context_length")

    @property
    def embedding_length(self) -> int | None:
        """Numbers in an embedding."""
        return self.number("embedding_length")

    @property
    def layers(self) -> int | None:
        return self.number("block_count")

    @property
    def vocabulary(self) -> int | None:
        """Tokens it knows."""
        return self.lengths.get("tokenizer.ggml.tokens", self.number("vocab_size"))

    @property
    def quantisation(self) -> str:
        """Such as ``Q4_K_M``; what most numbers are stored as, when the file does not say it."""
        told = self.values.get("general.file_type")
        if isinstance(told, int) and told in FILE_TYPES:
            return FILE_TYPES[told]
        return max(self.tensor_types, key=lambda name: self.tensor_types[name], default="")

    @property
    def pooling(self) -> Pooling | None:
        """None when the file does not say."""
        told = self.number("pooling_type")
        return Pooling(told) if told is not None and told in Pooling.__members__.values() else None

    @property
    def embeddings(self) -> bool:
        """It gives embeddings, not texts."""
        return self.pooling in _EMBEDS or (self.architecture in _ENCODERS and self.pooling is not Pooling.RANK)

    @property
    def chat_template(self) -> bool:
        """It says how a conversation is written."""
        return bool(self._text("tokenizer.chat_template"))

    @property
    def parts(self) -> int:
        """Files that the model consists of."""
        told = self.values.get("split.count")
        return told if isinstance(told, int) and told > 1 else 1

    def number(self, key: str) -> int | None:
        """An integer of the architecture's own, such as ``attention.head_count``; None when there is none."""
        told = self.values.get(f"{self.architecture}.{key}")
        return told if isinstance(told, int) and not isinstance(told, bool) and told >= 0 else None

    def _text(self, key: str) -> str:
        told = self.values.get(key)
        return told if isinstance(told, str) else ""


def parse(data: bytes) -> Gguf:
    """The head of a file that begins with *data*.

    Raises:
        HeadCut: *data* ends before the head does.
        GgufError: it is no such file, or its head cannot be right.
    """
    return _Head(data).read()


def read(path: Path) -> Gguf:
    """The head of the file at *path*, whose tensors are all there. Reads the disk.

    Raises:
        GgufError: it is none, cut short, or cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data = file.read(FIRST_READ_BYTES)
            while True:
                try:
                    found = parse(data)
                    break
                except HeadCut as error:
                    more = file.read(min(3 * len(data), HEAD_BYTES_MAX - len(data)))
                    if not more:
                        cut = len(data) < HEAD_BYTES_MAX
                        reason = f"cut short: {error}" if cut else f"its head has more than {HEAD_BYTES_MAX} bytes"
                        raise GgufError(reason) from None
                    data += more
    except OSError as error:
        raise GgufError((error.strerror or "unreadable").lower()) from error
    if found.data_bytes is not None and size < found.data_bytes:
        raise GgufError(f"cut short: {size} of {found.data_bytes} bytes")
    return replace(found, size_bytes=size)


def read_all(paths: Sequence[Path]) -> Gguf:
    """The model in *paths*, the first of which says what it is.

    Raises:
        GgufError: a file is none, and which; or there are not as many as the first one says.
    """
    assert paths
    found: list[Gguf] = []
    for path in paths:
        try:
            found.append(read(path))
        except GgufError as error:
            raise GgufError(f"{path.name}: {error}" if len(paths) > 1 else str(error)) from error
    first = found[0]
    if first.parts != len(paths):
        raise GgufError(f"{len(paths)} of {first.parts} parts")
    if len(found) == 1:
        return first
    types: dict[str, int] = {}
    for part in found:
        for name, count in part.tensor_types.items():
            types[name] = types.get(name, 0) + count
    return replace(
        first,
        tensors=sum(part.tensors for part in found),
        parameters=sum(part.parameters for part in found),
        data_bytes=None,
        tensor_types=types,
        size_bytes=sum(part.size_bytes for part in found),
    )


class _Head:
    """Reads the head from its beginning; ``at`` is the byte that comes next."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.strings = 0

    def read(self) -> Gguf:
        magic = self.data[:4]
        if magic != MAGIC[: len(magic)]:
            raise GgufError(f"not a GGUF file (it starts with {magic!r})")
        self.skip(4, "magic")
        version = self.number(_U32, "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian" if swapped in VERSIONS else f"of version {version}"
            raise GgufError(f"a GGUF file {what}; little-endian ones of version 2 and 3 can be used")
        tensors = self.count("tensors", TENSORS_MAX)
        keys = self.count("keys", KEYS_MAX)
        values: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(keys):
            self.key(values, lengths)
        return self.tensors(version, tensors, values, lengths)

    def key(self, values: dict[str, Value], lengths: dict[str, int]) -> None:
        name = self.text("key", KEY_BYTES_MAX)
        if not name or name in values or name in lengths:
            raise GgufError(f"the key {name!r} is there twice" if name else "a key without a name")
        kind = self.number(_U32, name)
        if kind == _ARRAY:
            length, kept = self.array(name, 1)
            lengths[name] = length
            if kept is not None:
                values[name] = kept
        elif kind == _STRING:
            values[name] = self.text(name, HEAD_BYTES_MAX)
        else:
            values[name] = self.number(self.layout(kind, name), name)

    def array(self, name: str, depth: int) -> tuple[int, tuple[bool | int | float, ...] | None]:
        """Its length, and its elements if they are few numbers."""
        if depth > ARRAY_DEPTH_MAX:
            raise GgufError(f"{name}: arrays in arrays, more than {ARRAY_DEPTH_MAX} deep")
        kind = self.number(_U32, name)
        length = self.number(_U64, name)
        if kind in (_STRING, _ARRAY):
            self.strings += length
            if self.strings > STRINGS_MAX:
                raise GgufError(f"{name}: more than {STRINGS_MAX} strings")
            for _ in range(length):
                if kind == _STRING:
                    self.skip(self.number(_U64, name), name)
                else:
                    self.array(name, depth + 1)
            return length, None
        layout = self.layout(kind, name)
        start = self.at
        self.skip(length * layout.size, name)
        if length > KEPT_MAX:
            return length, None
        return length, tuple(layout.unpack_from(self.data, start + i * layout.size)[0] for i in range(length))

    def tensors(self, version: int, count: int, values: dict[str, Value], lengths: dict[str, int]) -> Gguf:
        parameters = 0
        end: int | None = 0
        types: dict[str, int] = {}
        for _ in range(count):
            name = self.text("name of a tensor", KEY_BYTES_MAX)
            dimensions = self.number(_U32, name)
            if dimensions > DIMENSIONS_MAX:
                raise GgufError(f"tensor {name!r} has {dimensions} dimensions, more than {DIMENSIONS_MAX}")
            numbers = 1
            row = 1
            for index in range(dimensions):
                extent = self.number(_U64, name)
                row = extent if index == 0 else row
                numbers *= extent
            kind = self.number(_U32, name)
            offset = self.number(_U64, name)
            if numbers >= 2**63 or offset >= 2**63:
                raise GgufError(f"tensor {name!r} is larger than any file")
            parameters += numbers
            type_name, block, block_bytes = TENSOR_TYPES.get(kind, (f"type {kind}", 0, 0))
            types[type_name] = types.get(type_name, 0) + numbers
            if block == 0:
                end = None
            elif row % block:
                raise GgufError(f"tensor {name!r} of {type_name} has rows of {row} numbers, not a multiple of {block}")
            elif end is not None:
                end = max(end, offset + numbers // block * block_bytes)
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 2**20:
            raise GgufError(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return Gguf(
            version=version,
            values=values,
            lengths=lengths,
            tensors=count,
            parameters=parameters,
            # Without tensors nothing follows, not even the bytes that would align them.
            data_bytes=(start + end if count else self.at) if end is not None else None,
            tensor_types=types,
        )

    def count(self, what: str, most: int) -> int:
        found: int = self.number(_U64, f"count of {what}")
        if found > most:
            raise GgufError(f"{found} {what}, more than {most}")
        return found

    def layout(self, kind: int, name: str) -> struct.Struct:
        try:
            return _NUMBERS[kind]
        except KeyError:
            raise GgufError(f"{name}: a value of the unknown type {kind}") from None

    def number(self, layout: struct.Struct, what: str) -> Any:
        at = self.at
        self.skip(layout.size, what)
        return layout.unpack_from(self.data, at)[0]

    def text(self, what: str, most: int) -> str:
        length = self.number(_U64, what)
        if length > most:
            raise GgufError(f"{what}: a text of {length} bytes, more than {most}")
        at = self.at
        self.skip(length, what)
        return self.data[at : self.at].decode("utf-8", "replace")

    def skip(self, count: int, what: str) -> None:
        if count > HEAD_BYTES_MAX - self.at:
            raise GgufError(f"{what}: its end is beyond {HEAD_BYTES_MAX} bytes")
        if self.at + count > len(self.data):
            raise HeadCut(f"the head ends within {what}")
        self.at += count
