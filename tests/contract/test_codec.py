"""The codec: whatever bytes come in, what comes out is a message of the contract or a refusal that says why.

Goal: nobody can stop a service with bytes, and whoever sent a wrong message learns which field is wrong.
Method: the types are taken from the catalog, so a new contract is covered without an edit here. Valid
messages are generated from the types themselves; invalid ones are those, spoiled.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from computemesh.contracts import catalog, nodes, work
from computemesh.contracts.base import DEPTH_MAX, Message, Refused, convert, decode, encode, too_deep
from computemesh.hardware import Platform, Tier
from computemesh.ids import ID_PATTERN

Kind = type[Message]


def _kinds() -> list[Kind]:
    """Every type that crosses the bus, once, and the refusal."""
    found: list[Kind] = [event.payload for event in catalog.events()]
    for request in catalog.requests():
        found += [request.takes, request.gives]
    return list(dict.fromkeys([*found, Refused]))


KINDS: Final = _kinds()
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


# --- messages made from their types ---------------------------------------------------------------------------

_TEXT: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_ID: Final = st.from_regex(r"[A-Za-z0-9_-]{1,63}", fullmatch=True)
_SCALARS: Final = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | _TEXT
_ANY: Final = st.recursive(
    _SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


def values(info: inspect.Type) -> st.SearchStrategy[Any]:
    """JSON values that a field of this type takes."""
    match info:
        case inspect.Metadata(type=inner):
            return values(inner)
        case inspect.StrType(pattern=str(pattern), min_length=least, max_length=most):
            return _texts_like(pattern, least or 0, most)
        case inspect.StrType(min_length=least, max_length=most):
            return st.text(st.characters(exclude_categories=["Cs"]), min_size=least or 0, max_size=min(most or 8, 8))
        case inspect.BytesType():
            return st.binary(max_size=8).map(lambda data: base64.b64encode(data).decode())
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType(ge=least, lt=below, le=most):
            most = below - 1 if most is None and below is not None else most
            return st.integers(-(2**63) if least is None else least, 2**63 - 1 if most is None else most)
        case inspect.FloatType(gt=above, ge=least, le=most):
            low = above if least is None else least
            return st.floats(low, most, exclude_min=above is not None, allow_nan=False, allow_infinity=False)
        case _:
            return _compound(info)


def _texts_like(pattern: str, least: int, most: int | None) -> st.SearchStrategy[str]:
    """Texts that fit a pattern, and are as long as they may be."""
    if pattern == ID_PATTERN:
        return _ID
    if pattern == "^[0-9a-f]+$":
        return st.text("0123456789abcdef", min_size=max(least, 1), max_size=most)
    plain = pattern.removeprefix("^").removesuffix("(?!\\n)").removesuffix("$")
    found = st.from_regex(plain, fullmatch=True, alphabet=st.characters(exclude_categories=["Cs"]))
    return found.filter(lambda text: least <= len(text) <= (most or len(text)))


def _compound(info: inspect.Type) -> st.SearchStrategy[Any]:
    match info:
        case inspect.NoneType():
            return st.none()
        case inspect.AnyType():
            return _ANY
        case inspect.EnumType(cls=cls):
            return st.sampled_from([member.value for member in cls])
        case inspect.LiteralType(values=allowed):
            return st.sampled_from(list(allowed))
        case inspect.UnionType(types=kinds):
            return st.one_of([values(kind) for kind in kinds])
        case inspect.ListType(item_type=item, min_length=least):
            return st.lists(values(item), min_size=least or 0, max_size=2)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=2)
        case inspect.StructType(fields=fields, tag_field=tag_field, tag=tag):
            tags = {tag_field: st.just(tag)} if tag_field else {}
            return st.fixed_dictionaries(
                tags | {field.encode_name: values(field.type) for field in fields if field.required},
                optional={field.encode_name: values(field.type) for field in fields if not field.required},
            )
        case _:
            raise AssertionError(f"teach this test {info}")


@cache
def documents(kind: Kind) -> st.SearchStrategy[dict[str, Any]]:
    """Objects that are valid messages of *kind*."""
    return values(inspect.type_info(kind))


def fields_of(kind: Kind) -> tuple[inspect.Field, ...]:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    return info.fields


def _bare(info: inspect.Type) -> inspect.Type:
    return _bare(info.type) if isinstance(info, inspect.Metadata) else info


@cache
def sample(kind: Kind) -> dict[str, Any]:
    """One valid object with nothing but the required fields."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    tags = {info.tag_field: info.tag} if info.tag_field else {}
    return tags | {field.encode_name: _least(field.type) for field in info.fields if field.required}


def _least(info: inspect.Type) -> Any:
    match _bare(info):
        case inspect.StrType(pattern=pattern, min_length=least):
            long = (length for length in range(least or 1, 129) if re.search(pattern or "", "a" * length))
            return "a" * next(long)
        case inspect.LiteralType(values=allowed):
            return allowed[0]
        case inspect.UnionType(types=kinds):
            return _least(kinds[0])
        case inspect.BytesType():
            return ""
        case inspect.BoolType():
            return True
        case inspect.IntType() | inspect.FloatType():
            return 1
        case inspect.EnumType(cls=cls):
            return next(iter(cls)).value
        case inspect.ListType(item_type=item, min_length=least):
            return [_least(item)] * (least or 0)
        case inspect.DictType():
            return {}
        case inspect.StructType(cls=cls):
            return sample(cls)
        case other:
            raise AssertionError(f"teach this test {other}")


def id_fields() -> Iterator[tuple[Kind, str]]:
    """Every field that holds an id."""
    for kind in KINDS:
        for field in fields_of(kind):
            kinds = field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,)
            if any(isinstance(b := _bare(k), inspect.StrType) and b.pattern == ID_PATTERN for k in kinds):
                yield kind, field.encode_name


def refusal(data: bytes, kind: Kind) -> Refused:
    """The refusal of *data*, which must be one."""
    answer = decode(data, kind)
    assert isinstance(answer, Refused), f"{data[:80]!r} was taken as {answer}"
    assert answer.code == "bad_message"
    assert answer.status == 400
    assert answer.reason
    return answer


def taken(document: Any, kind: type[Any]) -> Any:
    """The message of *document*, which must be one."""
    answer = decode(msgspec.json.encode(document), kind)
    assert isinstance(answer, kind), f"{document} was refused: {answer}"
    return answer


# --- what is no message at all ----------------------------------------------------------------------------------

NO_MESSAGE: Final = {
    "text": b"hello",
    "half an object": b'{"work_id": "a"',
    "two documents": b"{} {}",
    "a trailing comma": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "a null byte": b"\0",
    "an array": b"[]",
    "a string": b'"{}"',
    "a number": b"1",
    "null": b"null",
    "true": b"true",
    "NaN": b"NaN",
    "bad UTF-8 outside strings": b"\xff\xfe",
    "bad UTF-8 in a string": b'{"\xff": 1}',
    "a raw NaN": b'{"unknown": NaN}',
    "a raw Infinity": b'{"unknown": -Infinity}',
    "100 arrays": b'{"unknown":' + b"[" * 100 + b"]" * 100 + b"}",
    "100 objects": b'{"unknown":' * 100 + b"1" + b"}" * 100,
    "20000 arrays": b'{"unknown":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "20000 open objects": b'{"a":' * 20_000,
    "20000 open arrays": b"[" * 20_000,
}


@every_kind
@pytest.mark.parametrize("data", NO_MESSAGE.values(), ids=NO_MESSAGE.keys())
def test_bytes_that_are_no_message_are_refused_by_every_type(kind: Kind, data: bytes) -> None:
    """Nothing is raised and nothing is taken, whatever the type expects."""
    refusal(data, kind)


@every_kind
def test_bad_utf8_in_a_known_string_field_is_refused(kind: Kind) -> None:
    """msgspec raises UnicodeDecodeError there, which is no MsgspecError."""
    for field in fields_of(kind):
        if isinstance(_bare(field.type), inspect.StrType):
            refusal(b'{"%s": "\xff"}' % field.encode_name.encode(), kind)


class Lenient(Message, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A message as production reads it."""

    name: str = ""


def test_bad_utf8_in_an_unknown_field_is_refused() -> None:
    """msgspec skips what it does not know without looking, and whoever passes it on would meet it."""
    assert decode(b'{"unknown": "fine"}', Lenient) == Lenient()
    assert refusal(b'{"unknown": "\xff"}', Lenient).reason == "not valid UTF-8"


CHOICES: Final = {
    ("min_tier", b'{"min_tier": "gpu_huge"}'): "'gpu_huge' is none of AI_FACTORY, GPU_PEER, GPU_INFRA, CPU_ONLY",
    ("states[1]", b'{"states": ["online", "dead"]}'): "'dead' is none of online, suspect, lost",
}


@pytest.mark.parametrize(("field", "data", "reason"), [(*given, reason) for given, reason in CHOICES.items()])
def test_who_names_no_choice_is_told_which_there_are(field: str, data: bytes, reason: str) -> None:
    assert (refusal(data, nodes.NodesQuery).field, refusal(data, nodes.NodesQuery).reason) == (field, reason)


def test_every_choice_in_every_message_is_told() -> None:
    """At the place where it stands, also in lists of structs."""
    answer = refusal(b'{"node_id": "a", "gpu_links": [{"a": 0, "b": 1, "kind": "wire"}]}', nodes.NodeAnnouncement)
    assert answer.field == "gpu_links[0].kind"
    assert answer.reason.startswith("'wire' is none of NVLINK, ")
    answer = refusal(b'{"node_id": "a", "delivery": "post"}', nodes.NodeAnnouncement)
    assert answer.reason == "'post' is none of direct, plain"


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_does_not_have_is_told_with_its_field(word: str) -> None:
    """Python's json writes it for a measurement that failed."""
    data = f'{{"node_id": "NaN", "gpus": [{{"vram_gb": {word}}}]}}'.encode()
    answer = refusal(data, nodes.NodeAnnouncement)
    assert answer.field == "vram_gb"
    assert answer.reason.startswith(f"{word} is no JSON")


@pytest.mark.parametrize(
    "inner", [b"[" * 20_000, b"{" * 100, b'\\"[' * 100, b"\\\\"], ids=["[", "{", "quotes", "slash"]
)
def test_brackets_inside_strings_are_no_nesting(inner: bytes) -> None:
    """A prompt may hold source code, escaped quotes and backslashes included."""
    data = b'{"work_type": "inference", "payload": {"prompt": "' + inner + b'", "more": [1]}}'
    message = decode(data, work.WorkItem)
    assert isinstance(message, work.WorkItem)
    assert message.payload["prompt"] == json.loads(b'"' + inner + b'"')


def test_depth_counts_what_is_open_not_what_there_is() -> None:
    """Thousands of objects side by side are fine; the bound itself is fine; one more is not."""
    side_by_side: list[Any] = [{"role": "user", "content": []}] * 5000
    assert taken({"work_type": "x", "payload": {"messages": side_by_side}}, work.WorkItem)
    for depth, deep in ((DEPTH_MAX, False), (DEPTH_MAX + 1, True)):
        assert too_deep(b"[" * depth + b"]" * depth) is deep
        inner = b"[" * (depth - 2) + b"]" * (depth - 2)
        answer = decode(b'{"work_type":"x","payload":{"a":' + inner + b"}}", work.WorkItem)
        assert isinstance(answer, Refused) is deep


# --- what is an object, but not the right one -------------------------------------------------------------------


@every_kind
def test_each_missing_required_field_is_named(kind: Kind) -> None:
    """Left out one at a time, the others being right."""
    for name in sample(kind):
        left = {key: value for key, value in sample(kind).items() if key != name}
        assert refusal(msgspec.json.encode(left), kind).field == name
    assert isinstance(decode(msgspec.json.encode(sample(kind)), kind), kind)


@every_kind
def test_each_field_of_a_wrong_type_is_named(kind: Kind) -> None:
    """Whatever the field holds, a list of a list of true is nothing for it."""
    for field in fields_of(kind):
        if isinstance(_bare(field.type), inspect.AnyType):
            continue
        said = refusal(msgspec.json.encode(sample(kind) | {field.encode_name: [[True]]}), kind)
        assert said.field.partition("[")[0] == field.encode_name, said


WRONG_INSIDE: Final[list[tuple[Kind, dict[str, Any], str]]] = [
    (work.WorkItem, {"work_type": "x", "requirements": {"gpus": "two"}}, "requirements.gpus"),
    (work.WorkItem, {"work_type": "x", "requirements": {"node_id": "a.b"}}, "requirements.node_id"),
    (work.WorkItem, {"work_type": "x", "labels": {"zone": 1}}, "labels[...]"),
    (work.WorkItem, {"work_type": "x", "labels": {"": "a"}}, "labels"),
    (work.WorkItem, {"work_type": "x", "payload": []}, "payload"),
    (work.WorkItem, {"work_type": ""}, "work_type"),
    (work.WorkItem, {"work_type": "x" * 201}, "work_type"),
    (nodes.NodeAnnouncement, {"node_id": "n", "gpus": [{}, {"index": -1}]}, "gpus[1].index"),
    (nodes.NodeAnnouncement, {"node_id": "n", "cpu": {"cores": "8"}}, "cpu.cores"),
    (nodes.NodeAnnouncement, {"node_id": "n", "tier": "BEST"}, "tier"),
    (nodes.NodeAnnouncement, {"node_id": "n", "delivery": "carrier pigeon"}, "delivery"),
    (nodes.NodeHeartbeat, {"node_id": "n", "running": [{"work_id": "a"}, {"work_id": "b*"}]}, "running[1].work_id"),
    (nodes.NodeHeartbeat, {"node_id": "n", "running": [{}]}, "running[0].work_id"),
]


@pytest.mark.parametrize(("kind", "document", "field"), WRONG_INSIDE)
def test_the_path_of_a_field_inside_is_given(kind: Kind, document: dict[str, Any], field: str) -> None:
    """From bytes, and from values that were parsed before."""
    assert refusal(msgspec.json.encode(document), kind).field == field
    converted = convert(document, kind)
    assert isinstance(converted, Refused)
    assert converted.field == field


BAD_IDS: Final = [
    "",
    " ",
    "a.b",
    ".",
    "*",
    "a*",
    ">",
    "a>",
    "a b",
    "a\n",
    "\n",
    "a\t",
    "a/b",
    "ä",
    "$KV",
    "a" * 64,
    "a\0",
]


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize(("kind", "field"), list(id_fields()), ids=lambda part: getattr(part, "__name__", part))
def test_an_id_that_is_not_one_token_is_refused(kind: Kind, field: str, bad: str) -> None:
    """It would change the address it becomes part of. The reason says what an id is."""
    said = refusal(msgspec.json.encode(sample(kind) | {field: bad}), kind)
    assert said.field == field
    assert said.reason == "an id is one token of letters, digits, '_' and '-', 1 to 63 long"
    taken(sample(kind) | {field: "A-z_0" + "9" * 58}, kind)


def test_ids_are_looked_for_in_every_contract_that_has_one() -> None:
    """Guards the test above against finding nothing."""
    found = {(kind.__name__, field) for kind, field in id_fields()}
    assert {("WorkItem", "work_id"), ("NodeAnnouncement", "node_id"), ("WorkCompleted", "work_id")} <= found


@pytest.mark.parametrize("priority", [-1, 10, 17, 10**30, -(10**30), 5.5, "5", None, True])
def test_a_priority_out_of_range_is_refused(priority: object) -> None:
    """0 to 9, whole numbers, and nothing that merely looks like one."""
    assert refusal(msgspec.json.encode({"work_type": "x", "priority": priority}), work.WorkItem).field == "priority"


def test_priorities_in_range_are_taken() -> None:
    """Both ends are in."""
    assert [taken({"work_type": "x", "priority": p}, work.WorkItem).priority for p in (0, 9)] == [0, 9]


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"nan", b"0x10", b"01", b"+1", b".5", b"1."])
@pytest.mark.parametrize("place", [b'"timeout_s": %s', b'"payload": {"t": %s}', b'"unknown": %s'])
def test_numbers_that_json_does_not_have_are_refused(place: bytes, number: bytes) -> None:
    """Python's own json takes some of them; no other language would."""
    refusal(b'{"work_type": "x", ' + place % number + b"}", work.WorkItem)


def test_numbers_beyond_a_double_or_the_fields_bounds_are_refused() -> None:
    """Infinity does not come in through the exponent, nor a huge integer through a bounded field."""
    for name, number in (("timeout_s", b"1e400"), ("timeout_s", b"1e300"), ("retries_max", b"1" + b"0" * 30)):
        assert refusal(b'{"work_type": "x", "%s": %s}' % (name.encode(), number), work.WorkItem).field == name
    refusal(b'{"work_type": "x", "payload": {"t": 1e400}}', work.WorkItem)
    refusal(b'{"work_type": "x", "payload": {"t": ' + b"9" * 5000 + b"}}", work.WorkItem)


def test_a_large_integer_in_a_payload_is_passed_on_as_it_is() -> None:
    """What an executor reads is none of our business, so it must also be encodable again."""
    item = taken({"work_type": "x", "payload": {"seed": 10**30}}, work.WorkItem)
    assert decode(encode(item), work.WorkItem) == item


@pytest.mark.parametrize("tier", list(Tier))
def test_tiers_are_taken_in_any_case_and_printed_in_upper_case(tier: Tier) -> None:
    """Seeds write them both ways."""
    for written in (tier.value, tier.value.lower(), tier.value.title()):
        said = taken({"node_id": "n", "tier": written}, nodes.NodeAnnouncement)
        assert said.tier is tier
        assert msgspec.json.decode(encode(said))["tier"] == tier.value.upper()
        assert taken({"work_type": "x", "requirements": {"min_tier": written}}, work.WorkItem)


@pytest.mark.parametrize("platform", list(Platform))
def test_platforms_are_taken_in_any_case(platform: Platform) -> None:
    """As tiers are."""
    for written in (platform.value, platform.value.lower()):
        assert taken({"node_id": "n", "platform": written}, nodes.NodeAnnouncement).platform is platform


def test_an_empty_message_is_one_without_fields() -> None:
    """`nats req subject ''` asks a question that needs no arguments."""
    assert decode(b"", nodes.NodesQuery) == nodes.NodesQuery()
    assert refusal(b"", work.WorkItem).field == "work_type"


# --- any bytes ---------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), data=st.binary(max_size=200))
def test_decoding_never_raises_on_any_bytes(kind: Kind, data: bytes) -> None:
    """A message or a refusal."""
    assert isinstance(decode(data, kind), kind | Refused)


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[Kind, bytes]:
    """A valid message in which some bytes were replaced, removed or put in."""
    kind = draw(st.sampled_from(KINDS))
    data = bytearray(msgspec.json.encode(draw(documents(kind))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(
            st.sampled_from([b"", b'"', b"\\", b"[", b"}", b"\xff", b"\0", b",", b"-", b"e9", b"[" * 70, b"\\ud800"])
        )
        data[at : at + draw(st.integers(0, 3))] = new
    return kind, bytes(data)


@settings(max_examples=500, deadline=None)
@given(spoiled())
def test_decoding_never_raises_on_spoiled_messages(case: tuple[Kind, bytes]) -> None:
    """Nearly right is where decoders break. What is taken all the same can be encoded again."""
    kind, data = case
    answer = decode(data, kind)
    assert isinstance(answer, kind | Refused)
    if not isinstance(answer, Refused):
        assert decode(encode(answer), kind) == answer


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_every_valid_message_survives_the_wire(data: st.DataObject) -> None:
    """Decoded, encoded and decoded again it is the same, and no field was lost on the way."""
    kind = data.draw(st.sampled_from(KINDS))
    document = data.draw(documents(kind))
    message = taken(document, kind)
    assert decode(encode(message), kind) == message
    again = msgspec.json.decode(encode(message))
    for name, value in document.items():
        if isinstance(value, str | bool | None):
            assert again.get(name, getattr(message, name)) == value  # Some types leave out what is as usual.
