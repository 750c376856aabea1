"""The pure parts of the command line: names of subjects, what people type, and lines of events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from computemesh.cli import events, intake, subjects
from computemesh.cli import work as work_commands
from computemesh.cli.common import Failure, printable
from computemesh.contracts import catalog, nodes, work
from computemesh.contracts.base import encode
from computemesh.contracts.work import TASK_TEXT, WorkError, WorkItem, WorkRecord, WorkState
from computemesh.hardware import Gpu
from computemesh.testing.golden import example

# --- names of subjects -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", catalog.events(), ids=lambda event: event.subject)
def test_an_event_is_found_by_its_short_and_its_full_name(event: Any) -> None:
    """And the subject it travels on leads back to it."""
    for name in (event.subject, subjects.short(event.subject)):
        assert subjects.find_events(name) == [subjects.pattern(event)]
    assert subjects.event_of(event.at("x1" if event.target else "")) is event


@pytest.mark.parametrize("request_", catalog.requests(), ids=lambda request: request.about)
def test_a_request_is_found_by_its_short_and_its_full_name(request_: Any) -> None:
    """With the target in the name, where it has one."""
    for name in (request_.subject, subjects.short(request_.subject)):
        assert subjects.find_request(name) == (request_, "")
        if request_.target:
            assert subjects.find_request(f"{name}.n1") == (request_, "n1")


def test_a_conversation_stands_for_all_its_events() -> None:
    """And a wildcard for those it covers."""
    ours = [subjects.pattern(event) for event in catalog.events() if event.subject.startswith("compute.work.")]
    assert len(ours) > 3
    assert subjects.find_events("work") == subjects.find_events("compute.work.>") == ours
    assert subjects.find_events(">") == [subjects.pattern(event) for event in catalog.events()]
    assert subjects.find_events("compute.*.lost.v1") == ["compute.nodes.lost.v1"]


@pytest.mark.parametrize("name", ["work.state.w-1", "compute.work.state.v1.w-1"])
def test_one_event_of_one_item_is_one_subject(name: str) -> None:
    """Nothing else is heard then."""
    assert subjects.find_events(name) == ["compute.work.state.v1.w-1"]


def test_a_subject_outside_the_contracts_stays_as_it_is() -> None:
    """Whether one may hear it the server decides."""
    for name in ("orders.>", "$SYS.>", "compute.mine.v1", "a.*.b"):
        assert subjects.find_events(name) == [name]


@pytest.mark.parametrize("name", ["wrk", "work.stat", "compute.work.stat.v1", "orders", "a..b", "a b.c", ">.a", ""])
def test_what_looks_like_a_slip_is_no_name(name: str) -> None:
    """Hearing nothing for ever would be a poor answer to it."""
    with pytest.raises(LookupError):
        subjects.find_events(name)


def test_near_names_are_offered() -> None:
    """For what was typed short and in full."""
    known = [subjects.short(request.subject) for request in catalog.requests()]
    assert subjects.near("node.query", known)[0] == "nodes.query"
    assert subjects.near("compute.nodes.qery.v1", known)[0] == "nodes.query"
    assert "work.cancel" in subjects.near("jobs.cancel", known)
    assert subjects.near("zzz", known) == []


@pytest.mark.parametrize(
    ("wide", "subject", "covered"),
    [
        ("a.*", "a.b", True), ("a.*", "a.b.c", False), ("a.>", "a", False), ("a.>", "a.b.c", True), ("a", "a", True),
        ("a.*", "a.*", True), ("a.b", "a.*", False), ("a.*", "a.>", False), (">", "a", True), ("*", "a.b", False),
    ],
)  # fmt: skip
def test_wildcards_cover_what_the_server_says_they_do(wide: str, subject: str, covered: bool) -> None:
    """``*`` is one token, ``>`` at least one."""
    assert subjects.covers(wide, subject) is covered


# --- what people type --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("{a: .nan}", "a", "nan is no number"),
        ("{a: {b: [1, -.inf]}}", "a.b[1]", "-inf is no number"),
        ("{a: {1: x}}", "a", "the key 1 is not text"),
        ("{a: &x [*x]}", "", "contains itself"),
        ("[" * 65 + "1" + "]" * 65, "", "nested deeper"),
        ("{a: " + "[" * 65 + "1" + "]" * 65 + "}", "a[0]", "nested deeper"),
        ("{a: 1, a: 2}", "a", "line 1, column 8: a stands twice, first at line 1, column 2"),
        ("x: &a [1,1,1,1,1,1,1,1]\n" + "".join(
            f"x{n}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 8)}]\n" for n in range(8)), "", "more than"),
    ],
    ids=["nan", "inf", "key", "circle", "deep JSON", "deep", "twice", "bomb"],
)  # fmt: skip
def test_what_json_cannot_carry_is_refused_by_its_path(text: str, field: str, says: str) -> None:
    """Else it would be sent as something else, or never."""
    with pytest.raises(Failure) as failed:
        intake.documents(text.encode(), "item.yaml")
    assert says in failed.value.message
    assert failed.value.message.startswith("item.yaml: ")
    assert failed.value.field.startswith(field)


TASK = """\
apiVersion: mloc/v1
kind: Task
metadata: {name: small}
spec:
  taskType: talk
  resources: {replicas: 1, hardware: {cpu: 1, memory: 64Mi}}
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("work_type: x\npriority: lots\n", "priority: Expected `int`, got `str` (line 2, column 1)"),
        ("work_type: x\nprioritty: 1\n", "prioritty: unknown field (line 2, column 1)"),
        ("- work_type: x\n- work_type: x\n  requirements:\n    gpu: 1\n", "gpu: unknown field (line 4, column 5)"),
        ("work_type: x\n---\nwork_type: x\npriority: 99\n", "(line 4, column 1)"),
        ("work_type: x\n---\nwork_type: x\nwork_type: y\n", "line 4, column 1: work_type stands twice"),
        ("[3]", "[0]: a work item is a mapping"),
        ("", "no work item in it"),
        (TASK.replace("cpu: 1", "cpu: many"), "item.yaml: spec.resources.hardware.cpu: 'many' is no number of CPUs"),
        (TASK.replace("{name: small}", ""), "item.yaml: Missing required field: metadata.name (line 3"),
        ("- work_type: x\n---\n" + TASK.replace("cpu: 1", "cpu: many"), "CPUs, such as 8 or 500m (line 8, column"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_of_work_is_said_once_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "item.yaml").write_text(text)
    with pytest.raises(Failure) as failed:
        work_commands.read_items(str(tmp_path / "item.yaml"), {})
    assert says.replace("`", "'") in failed.value.message
    if failed.value.field:
        assert failed.value.message.count(failed.value.field.rpartition(".")[2] + ":") <= 1


def test_a_file_of_work_is_json_or_yaml_with_one_item_or_many(tmp_path: Path) -> None:
    """Also one too large for a message, and JSON with tabs. Options of the command count for all."""

    def read(text: str) -> list[WorkItem]:
        (tmp_path / "items").write_text(text)
        return work_commands.read_items(str(tmp_path / "items"), {"priority": 7})

    large = "x" * 2_000_000
    for text in (f"work_type: x\npayload: {{a: {large}}}\n", f'{{"work_type":\t"x", "payload": {{"a": "{large}"}}}}'):
        (item,) = read(text)
        assert (item.payload, item.priority) == ({"a": large}, 7)
    assert [item.work_type for item in read("- work_type: a\n- work_type: b\n---\n---\nwork_type: c\n")] == list("abc")
    (task,) = read(TASK)
    assert (task.work_type, task.annotations[TASK_TEXT]) == ("talk", TASK)


@pytest.mark.parametrize(
    ("fields", "path", "hint"),
    [
        ({"prioritty": 1}, "prioritty", "did you mean priority?"),
        ({"requirements": {"gpu": 1}}, "requirements.gpu", "did you mean gpus?"),
        ({"zzz": 1}, "zzz", "known: work_id, "),
    ],
)
def test_an_unknown_field_is_named_with_the_nearest_known_one(fields: dict[str, Any], path: str, hint: str) -> None:
    """At any depth."""
    with pytest.raises(Failure) as failed:
        intake.message({"work_type": "x", **fields}, WorkItem)
    assert (failed.value.field, failed.value.code) == (path, "unknown_field")
    assert failed.value.hint.startswith(hint)


def test_unknown_fields_are_found_in_lists_and_not_in_free_payloads() -> None:
    """A payload is the executor's business."""
    assert intake.unknown_field({"node_id": "n", "gpus": [{"name": "x"}, {"nam": "y"}]}, nodes.NodeAnnouncement) == (
        "gpus[1].nam",
        [field.name for field in msgspec.structs.fields(Gpu)],
    )
    assert intake.unknown_field({"work_type": "x", "payload": {"any": {"thing": 1}}}, WorkItem) is None


# --- lines of events ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", catalog.events(), ids=lambda event: event.subject)
def test_every_event_has_a_line_for_people_and_one_for_programs(event: Any) -> None:
    """With every field set, and with only those that must be."""
    payload = example(event.payload)
    heard = events.read(event.at("x1" if event.target else ""), encode(payload), None, 0.0)
    line = events.plain(events.as_text(heard))
    assert "\n" not in line
    assert subjects.short(event.subject) in line
    assert "not readable" not in line
    program = json.loads(events.as_json(heard))
    assert program["payload"] == json.loads(encode(payload))
    assert program["time"] == "1970-01-01T00:00:00.000Z"


def test_a_line_shows_what_matters() -> None:
    """The item first, its state, and only fields that say something."""
    error = WorkError(reason="no such\nfile", code="bad_payload")
    record = WorkRecord(work_id="w-1", state=WorkState.FAILED, work_type="x", node_id="n1", attempt=2, error=error)
    line = events.plain(events.as_text(events.read("compute.work.state.v1.w-1", encode(record), None, 0.0)))
    shown = "w-1 failed work_type=x node_id=n1 attempt=2 error=no such file (bad_payload)"
    assert line.split("  ", 1)[1].split() == ["work.state", *shown.split()]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "truncated"), (b"\xff", "UTF-8"), (b"[1]", "Expected"), (b'{"work_id": "a.b"}', "work_id: an id is one"),
        (b"", "work_id"), (b"[" * 5000, "nested"), (b'{"work_id": "w", "result": "\x1b[2J"}', "malformed"),
    ],
)  # fmt: skip
def test_what_does_not_decode_is_shown_with_the_reason(data: bytes, says: str) -> None:
    """For people and for programs; nothing raises, and nothing steers the terminal."""
    heard = events.read("compute.work.completed.v1", data, {"traceparent": "00-1"}, 0.0)
    line = events.plain(events.as_text(heard))
    assert "not readable: " in line
    assert says in line
    assert "\x1b" not in line
    program = json.loads(events.as_json(heard))
    assert says in f"{program['problem']['field']}: {program['problem']['reason']}"
    assert program["headers"] == {"traceparent": "00-1"}


def test_a_message_outside_the_contracts_is_shown_as_it_is() -> None:
    """As JSON if it is some, else as text."""
    assert json.loads(events.as_json(events.read("orders.new", b'{"a": [1]}', None, 0.0)))["payload"] == {"a": [1]}
    assert json.loads(events.as_json(events.read("orders.new", b"hello", None, 0.0)))["payload"] == "hello"
    assert events.plain(events.as_text(events.read("orders.new", b"hello", None, 0.0))).endswith("hello")


def test_nothing_that_others_send_steers_the_terminal() -> None:
    """Control characters are spelt out."""
    assert printable("a\x1b[2Jb\rc\x9bd\x07") == "a\\x1b[2Jb\\x0dc\\x9bd\\x07"
    report = work.WorkFailed(work_id="w", error="\x1b]0;owned\x07[bold]x")
    line = events.plain(events.as_text(events.read("compute.work.failed.v1", encode(report), None, 0.0)))
    assert "\x1b" not in line
    assert "[bold]x" in line


def test_a_filter_compares_fields_as_json_writes_them() -> None:
    """Also fields of fields."""
    record = WorkRecord(work_id="w", state=WorkState.FAILED, work_type="x", attempt=3, error=WorkError(reason="r"))
    heard = events.read("compute.work.state.v1.w", encode(record), None, 0.0)
    for wanted in (
        {},
        {"work_id": "w"},
        {"attempt": "3"},
        {"error.code": "failed"},
        {"plain": "false", "state": "failed"},
    ):
        assert events.matches(heard, wanted), wanted
    for wanted in ({"work_id": "v"}, {"nothing": "x"}, {"state.x": "y"}, {"state": "failed", "attempt": "4"}):
        assert not events.matches(heard, wanted), wanted


def test_routine_is_heard_only_when_it_is_asked_for() -> None:
    """By its name or by the option."""
    beat = nodes.HEARTBEAT.subject
    assert beat not in events.to_hear([], heartbeats=False)
    assert beat not in events.to_hear(["nodes"], heartbeats=False)
    assert beat in events.to_hear([], heartbeats=True)
    assert beat in events.to_hear(["nodes.heartbeat"], heartbeats=False)
