"""What the head of a GGUF file says: of small files made here, of the real model, and of what is none.

Format: docs/gguf.md of ggml. The sizes of blocks and the numbers of types are those of its ``gguf`` package 0.17.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from computemesh import gguf
from computemesh.gguf import GgufError, HeadCut, Pooling
from computemesh.models import embedded_files
from computemesh.testing.ggufs import a_gguf


def head(keys: bytes, count: int = 1, tensors: int = 0, version: int = 3) -> bytes:
    """The head of a file, with these bytes as its keys."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + keys


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def test_a_chat_model_tells_what_it_is() -> None:
    """All that a node says of a model is in the head of its file."""
    found = gguf.parse(a_gguf())
    assert (found.architecture, found.name, found.kind) == ("llama", "Tiny", "model")
    assert (found.context_tokens, found.embedding_length, found.layers, found.vocabulary) == (2048, 64, 2, 3)
    assert (found.quantisation, found.parameters, found.tensors) == ("Q4_K_M", 1024, 1)
    assert found.chat_template
    assert not found.embeddings
    assert found.parts == 1


@pytest.mark.model
def test_the_real_model_tells_what_it_is() -> None:
    """As the ``gguf`` package reads it: 272 tensors that end with the file."""
    (path,) = embedded_files()
    found = gguf.read(path)
    assert (found.architecture, found.context_tokens, found.embedding_length, found.layers) == ("llama", 8192, 576, 30)
    assert (found.tensors, found.parameters, found.vocabulary) == (272, 134_515_008, 49_152)
    assert found.quantisation == "Q4_1"
    assert found.chat_template
    assert found.number("attention.head_count_kv") == 3
    assert found.data_bytes == found.size_bytes == path.stat().st_size == 98_362_432


@pytest.mark.parametrize(
    ("keys", "embeds"),
    [
        ({"general.architecture": "bert"}, True),
        ({"general.architecture": "bert", "bert.pooling_type": Pooling.RANK.value}, False),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": Pooling.LAST.value}, True),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": Pooling.NONE.value}, False),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 77}, False),
        ({"general.architecture": "qwen3"}, False),
    ],
)
def test_an_embedding_model_is_known_by_its_pooling_or_its_architecture(keys: dict[str, Any], embeds: bool) -> None:
    """A model that ranks documents gives no embeddings."""
    assert gguf.parse(a_gguf(keys)).embeddings is embeds


def test_what_is_no_model_says_so() -> None:
    """Adapters and projectors are GGUF files too."""
    assert gguf.parse(a_gguf({"general.type": "adapter"})).kind == "adapter"
    assert gguf.parse(a_gguf({"general.architecture": "clip"})).kind == "mmproj"


def test_without_a_file_type_most_numbers_decide_the_quantisation() -> None:
    """Norms are always stored with full precision, and say nothing."""
    tensors = [("norm", (64,), 0), ("w", (256, 4), 14)]
    assert gguf.parse(a_gguf({"general.file_type": None}, tensors=tensors)).quantisation == "Q6_K"


def test_short_arrays_of_numbers_are_kept_and_long_ones_counted() -> None:
    """Some models have a number of heads for each layer; sizing wants to know."""
    found = gguf.parse(a_gguf({"llama.attention.head_count_kv": [8, 4], "x": list(range(5000))}))
    assert found.values["llama.attention.head_count_kv"] == (8, 4)
    assert "x" not in found.values
    assert found.lengths["x"] == 5000


def test_a_head_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    """Vocabularies have megabytes."""
    path = tmp_path / "long.gguf"
    path.write_bytes(a_gguf({"tokenizer.ggml.tokens": ["x" * 100] * 60_000}))
    assert path.stat().st_size > gguf.FIRST_READ_BYTES * 4
    assert gguf.read(path).vocabulary == 60_000


def test_a_file_that_is_cut_short_is_refused_with_both_sizes(tmp_path: Path) -> None:
    """A copy that broke off has a perfect head."""
    whole = a_gguf()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-10])
    with pytest.raises(GgufError, match=f"cut short: {len(whole) - 10} of {len(whole)} bytes"):
        gguf.read(path)
    path.write_bytes(whole[:100])
    with pytest.raises(GgufError, match="cut short: the head ends within"):
        gguf.read(path)
    with pytest.raises(GgufError, match="no such file"):
        gguf.read(tmp_path / "nowhere.gguf")


def test_the_parts_of_a_model_are_read_together(tmp_path: Path) -> None:
    """Numbers and sizes of all parts count, and a missing part is told."""
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    first.write_bytes(a_gguf({"split.count": 2}, tensors=[("a", (256,), 12)]))
    second.write_bytes(a_gguf({"split.count": 2}, tensors=[("b", (256, 3), 14)]))
    found = gguf.read_all([first, second])
    assert (found.parameters, found.tensors, found.parts) == (1024, 2, 2)
    assert found.size_bytes == first.stat().st_size + second.stat().st_size
    assert found.tensor_types == {"Q4_K": 256, "Q6_K": 768}
    with pytest.raises(GgufError, match="1 of 2 parts"):
        gguf.read_all([first])
    second.write_bytes(b"PK")
    with pytest.raises(GgufError, match=r"m-00002-of-00002.gguf: not a GGUF file"):
        gguf.read_all([first, second])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (head(b"", count=0, version=1), "of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (head(b"", count=2**40), "1099511627776 keys, more than"),
        (head(b"", count=0, tensors=2**50), "1125899906842624 tensors, more than"),
        (head(struct.pack("<Q", 2**63)), "a text of 9223372036854775808 bytes"),
        (head(text("k") + struct.pack("<I", 99)), "k: a value of the unknown type 99"),
        (head(text("k") + struct.pack("<IQ", 8, 2**62)), "k: a text of"),
        (head(text("k") + struct.pack("<IIQ", 9, 0, 2**60)), "k: its end is beyond"),
        (head(text("k") + struct.pack("<IIQ", 9, 8, 2**60)), "k: more than 4000000 strings"),
        (head(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9), "k: arrays in arrays"),
        (head((text("k") + struct.pack("<II", 4, 1)) * 2, count=2), "the key 'k' is there twice"),
        (head(text("") + struct.pack("<II", 4, 1)), "a key without a name"),
        (head(text("t") + struct.pack("<I", 9), count=0, tensors=1), "tensor 't' has 9 dimensions"),
        (head(text("t") + struct.pack("<IQIQ", 1, 100, 12, 0), count=0, tensors=1), "rows of 100 numbers"),
        (head(text("t") + struct.pack("<I4QIQ", 4, *[2**60] * 4, 0, 0), count=0, tensors=1), "larger than any file"),
        (head(text("general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(data: bytes, reason: str) -> None:
    """No count is believed before it is bounded: none of these reads or allocates anything large."""
    with pytest.raises(GgufError) as caught:
        gguf.parse(data)
    assert reason in str(caught.value)
    assert not isinstance(caught.value, HeadCut)


def test_a_tensor_type_of_tomorrow_is_no_fault() -> None:
    """Its numbers are counted; how large the file must be cannot be told."""
    data = head(text("t") + struct.pack("<IQIQ", 1, 64, 250, 0), count=0, tensors=1)
    found = gguf.parse(data)
    assert found.parameters == 64
    assert found.data_bytes is None
    assert found.tensor_types == {"type 250": 64}
