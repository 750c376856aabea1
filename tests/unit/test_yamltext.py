"""Strict YAML: what is refused and where it stands, that nothing blows up, and that the rest is what PyYAML reads."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from computemesh.contracts.base import Refused
from computemesh.yamltext import Document, Place, read

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
LONG_BOMB = f"a: &a {'x' * 100_000}\nb: [{','.join(['*a'] * 20)}]"


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1", "a stands twice, first at line 1, column 1"),
        ("a: {b: 1, b: 2}", "line 1, column 11", "a.b stands twice"),
        ("a: 1\n1: x", "line 2, column 1", "the key 1 is not text"),
        ("on: x", "line 1, column 1", "the key True is not text"),
        ("? [a]\n: b", "line 1, column 3", "a key is a word"),
        ("a: &a [*a]", "line 1, column 8", "contains itself"),
        ("a: *b", "line 1, column 4", "stands for nothing"),
        ("a: .inf", "line 1, column 4", "no number that JSON can carry"),
        ("a: .nan", "line 1, column 4", "no number that JSON can carry"),
        ("a: 99999999999999999999", "line 1, column 4", "more than 64 bits"),
        (f"a: {'9' * 5000}", "line 1, column 4", "is no int"),
        ("a: !!int x", "line 1, column 4", "is no int"),
        ("a: !!python/object:os.system {}", "line 1, column 4", "mean nothing here"),
        ("a: !!binary aGk=", "line 1, column 4", "mean nothing here"),
        ("a: !!set {x}", "line 1, column 4", "mean nothing here"),
        ("a: <<", "line 1, column 4", "mean nothing here"),
        ("<<: 1", "line 1, column 1", "<< takes a mapping"),
        ("a: [1\nb: 2", "line 2, column ", "did not find expected"),
        ("a: b: c", "line 1, column 5", "mapping values are not allowed"),
        ("a\n---\nb", "line 2, column 1", "a second document"),
        ("", "", "nothing in it"),
        ("\x00", "", "control characters"),
        ("[" * 100_000, "line 1, column 66", "nested deeper"),
        ("{a: " * 100_000, "line 1, column ", "nested deeper"),
        ("- " * 100_000, "line 1, column ", "nested deeper"),
        (f"[{'1,' * 30_000}]", "line 1, column ", "more than 20000 values"),
        (BOMB, "line 5, column ", "more than 20000 values"),
        (LONG_BOMB, "line 2, column ", "with its aliases written out"),
    ],
    ids=lambda value: value[:24],
)
def test_what_is_refused_is_refused_with_its_place(text: str, place: str, said: str) -> None:
    found = read(text)
    if not isinstance(found, Refused):
        pytest.fail("it was read")  # Not shown: a bomb that went off would fill the memory.
    assert (found.code, found.status) == ("bad_yaml", 400)
    assert found.reason.startswith(f"Invalid YAML: {place}"), found.reason
    assert said in found.reason, found.reason


def test_bytes_that_are_no_utf_8_and_texts_that_are_too_long_are_refused() -> None:
    assert read(b"a: \xff") == Refused(code="bad_yaml", reason="Invalid YAML: not text in UTF-8")
    long = read("a" * (1024 * 1024 + 1))
    assert isinstance(long, Refused)
    assert (long.code, long.status) == ("too_large", 413)


def test_numbers_are_numbers_and_dates_are_text() -> None:
    """As YAML 1.2 has it."""
    found = read("a: 1e-5\nb: 2030-01-31\nc: 1.5E3\nd: 0x10\ne: 2030-01-31T12:00:00Z\nf: 1e\n")
    assert isinstance(found, Document)
    assert found.value == {"a": 1e-5, "b": "2030-01-31", "c": 1500.0, "d": 16, "e": "2030-01-31T12:00:00Z", "f": "1e"}


def test_anchors_and_merges_work() -> None:
    found = read("base: &b {x: 1, y: 2}\nmade: {<<: *b, y: 3}\nmore: {<<: [{x: 9}, *b]}\nlist: [*b]\n")
    assert isinstance(found, Document)
    assert found.value["made"] == {"x": 1, "y": 3}
    assert found.value["more"] == {"x": 9, "y": 2}
    assert found.value["list"] == [{"x": 1, "y": 2}]


def test_a_place_is_that_of_the_key_or_of_what_contains_it() -> None:
    found = read("a:\n  b:\n    - x\n    - c: 1\n")
    assert isinstance(found, Document)
    assert found.place("a.b[1].c") == Place(4, 7)
    assert found.place("a.b[1].d.e") == Place(4, 7)
    assert found.place("a.z") == Place(1, 1)
    assert found.place("z") is None


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
NUMBER_TOO = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+")
"""Text that PyYAML writes without quotes, and that is a number in YAML 1.2, as here."""
TEXT = st.text().filter(lambda text: not NUMBER_TOO.fullmatch(text))
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(deadline=None)
@given(PLAIN)
def test_what_pyyaml_writes_is_read_as_it_was(value: Any) -> None:
    text = yaml.safe_dump(value)
    found = read(text)
    assert isinstance(found, Document), (found, text)
    assert found.value == value or (isinstance(value, float) and math.isclose(found.value, value))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_document_or_a_refusal(data: bytes) -> None:
    found = read(data)
    assert isinstance(found, Refused) or msgspec.json.encode(found.value)


@settings(deadline=None)
@given(st.text(alphabet="ab:-?&*!|>[]{},'\"%#\n \t<.1", max_size=60))
def test_any_text_of_the_signs_of_yaml_is_a_document_or_a_refusal(text: str) -> None:
    """And what is read can be sent, and is what PyYAML reads where that reads it."""
    found = read(text)
    if isinstance(found, Document):
        msgspec.json.encode(found.value)
