"""MLOC's task files, made into work items. Pure.

A task is a mapping with ``apiVersion``, ``kind``, ``metadata`` and ``spec``, in YAML or JSON; docs/tasks.md says what
each field becomes. Of a wrong one the field is named, and where it stands.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec.structs import replace

from computemesh import inference
from computemesh.contracts.base import Refused, convert, refused
from computemesh.contracts.work import TASK_TEXT, WorkItem
from computemesh.inference import InferencePayload
from computemesh.yamltext import Document, is_list, is_mapping

REQUIRED: Final = (
    "apiVersion",
    "kind",
    "metadata.name",
    "spec.taskType",
    "spec.resources.replicas",
    "spec.resources.hardware.cpu",
    "spec.resources.hardware.memory",
)

TAG: Final = "true"
"""Value of the label that a tag without a value is."""

S = TypeVar("S", bound=msgspec.Struct)

_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _Task(msgspec.Struct, frozen=True, kw_only=True):
    apiVersion: str  # noqa: N815
    kind: str
    metadata: dict[str, Any]
    spec: dict[str, Any]


class _Metadata(msgspec.Struct, frozen=True, kw_only=True):
    name: _Text
    owner: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    id: str | None = None


class _Gpu(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    count: Annotated[int, msgspec.Meta(ge=0)]


class _Hardware(msgspec.Struct, frozen=True, kw_only=True):
    cpu: str | int | float
    memory: str | int
    gpu: _Gpu | None = None


class _Resources(msgspec.Struct, frozen=True, kw_only=True):
    replicas: int
    hardware: _Hardware
    tags: list[str] | dict[str, str] = []


class _Source(msgspec.Struct, frozen=True, kw_only=True):
    identifier: str = ""


class _Model(msgspec.Struct, frozen=True, kw_only=True):
    source: _Source = _Source()


class _Data(msgspec.Struct, frozen=True, kw_only=True):
    type: str
    items: list[str] = []


_PARTS: Final[Mapping[str, type[msgspec.Struct]]] = {
    "": _Task,
    "metadata": _Metadata,
    "spec.resources": _Resources,
    "spec.resources.hardware": _Hardware,
    "spec.resources.hardware.gpu": _Gpu,
}
"""Parts of a task whose fields are all known, so that a slip of the pen is none of them."""


class _Bad(Exception):
    """What is wrong with the task, by the path of the field."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path


OF_OURS: Final[Mapping[str, str]] = {
    "work_id": "metadata.id",
    "owner": "metadata.owner",
    "labels": "metadata.labels",
    "annotations": "metadata.annotations",
    "work_type": "spec.taskType",
    "model_name": "spec.model.source.identifier",
    "priority": "spec.priority",
    "timeout_s": "spec.timeoutSeconds",
    "retries_max": "spec.retries",
    "deadline_at": "spec.deadline",
    "after": "spec.after",
    "replicas": "spec.resources.replicas",
    "requirements.cpus": "spec.resources.hardware.cpu",
    "requirements.ram_mb": "spec.resources.hardware.memory",
    "requirements.gpus": "spec.resources.hardware.gpu.count",
    "requirements.gpu_model": "spec.resources.hardware.gpu.type",
    "requirements.labels": "spec.resources.tags",
    "requirements": "spec.resources",
    "payload": "spec",
}
"""Where the fields of a work item come from, by their paths in a task."""

_TERMS: Final = {"priority": "priority", "timeoutSeconds": "timeout_s", "retries": "retries_max"}
"""Fields of ``spec`` that are fields of a work item under another name."""

_OURS: Final = frozenset({"taskType", "resources", "deadline", "after", *_TERMS})
"""Fields of ``spec`` that are not the executor's."""

_OF_INFERENCE: Final = frozenset({"model", "inference", "data", "output"})

_SYSTEM: Final = ("system_prompt", "systemPrompt")
"""Fields of ``spec.inference`` that are not the executor's."""


def is_task(fields: Mapping[str, Any]) -> bool:
    """Whether a document is meant as a task, and not as a work item."""
    return "spec" in fields and ("apiVersion" in fields or "kind" in fields)


def item_of(document: Document) -> WorkItem | Refused:
    """The work item that a task asks for. It keeps the task's text, if it was one, as an annotation.

    A refusal has the code ``bad_task``, the path of the field in the task, and the place where it stands.
    """
    try:
        return _item(document)
    except _Bad as bad:
        return complaint(document, bad.path, str(bad))


def complaint(document: Document, path: str, reason: str) -> Refused:
    """A refusal because of one field of a task, which says where that stands."""
    place = document.place(path)
    return Refused(code="bad_task", field=path, reason=f"{reason} ({place})" if place else reason)


def told_in_its_words(answer: Refused, document: Document) -> Refused:
    """A refusal of the work item as one of the task that it was made from."""
    path = _of_theirs(answer.field)
    place = document.place(path) if path else None
    reason = f"{path}: {answer.reason} ({place})" if place else answer.reason
    return replace(answer, field=path, reason=reason)


def _of_theirs(field: str) -> str:
    """The path in a task of a field of the work item."""
    for ours, theirs in OF_OURS.items():
        if field == ours or field.startswith((f"{ours}.", f"{ours}[")):
            return theirs + ("" if ours in ("payload", "requirements") else field[len(ours) :])
    return field


def _item(document: Document) -> WorkItem:
    if not is_mapping(document.value):
        raise _Bad("", "a task is a mapping with apiVersion, kind, metadata and spec")
    _only_known(document.value)
    for path in REQUIRED:
        _demand(document.value, path)
    task = _part(document.value, _Task, "")
    metadata = _part(task.metadata, _Metadata, "metadata")
    resources = _part(task.spec["resources"], _Resources, "spec.resources")
    work_type = task.spec["taskType"]
    fields: dict[str, Any] = {
        "work_type": work_type,
        "model_name": _part(_without_nulls(task.spec.get("model") or {}), _Model, "spec.model").source.identifier,
        "payload": _prompts(task.spec) if work_type == "inference" else _passed_on(task.spec),
        "owner": metadata.owner,
        "labels": metadata.labels,
        "annotations": _annotations(metadata, document.text),
        "replicas": resources.replicas,
        "requirements": _requirements(resources),
    }
    if metadata.id is not None:
        fields["work_id"] = metadata.id
    fields |= {ours: task.spec[name] for name, ours in _TERMS.items() if task.spec.get(name) is not None}
    if (deadline := task.spec.get("deadline")) is not None:
        fields["deadline_at"] = _unix_s(deadline, "spec.deadline")
    if (after := task.spec.get("after")) is not None:
        fields["after"] = [after] if isinstance(after, str) else after
    made = convert(fields, WorkItem)
    if isinstance(made, Refused):
        path = _of_theirs(made.field)
        raise _Bad(path, f"{path}: {made.reason}")
    return made


def _only_known(task: Mapping[str, Any]) -> None:
    """Before anything is missed: what seems missing may be what is misspelt."""
    for path, kind in _PARTS.items():
        _no_other(_at(task, path), kind.__struct_fields__, path)
    if _at(task, "spec.taskType") == "inference":
        _no_other(_at(task, "spec"), (*sorted(_OURS), *sorted(_OF_INFERENCE)), "spec")
        _no_other(_at(task, "spec.inference"), (*InferencePayload.__struct_fields__, *_SYSTEM), "spec.inference")


def _no_other(part: Any, known: Sequence[str], path: str) -> None:
    for name in part if is_mapping(part) else ():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            field = f"{path}.{name}" if path else name
            raise _Bad(field, f"{field}: no such field; {hint}")


def _at(task: Any, path: str) -> Any:
    """What stands at a path; None where nothing does."""
    found = task
    for name in path.split(".") if path else ():
        found = found.get(name) if is_mapping(found) else None
    return found


def _demand(task: Mapping[str, Any], path: str) -> None:
    if _at(task, path) is None:
        raise _Bad(path, f"Missing required field: {path}")


def _part(fields: Any, kind: type[S], path: str) -> S:
    """A part of the task as what it should be."""
    try:
        return msgspec.convert(_without_nulls(fields), kind)
    except (ValueError, RecursionError) as error:
        bad = refused(error, kind)
    field = ".".join(filter(None, [path, bad.field]))
    if "missing required" in bad.reason:
        raise _Bad(field, f"Missing required field: {field}")
    raise _Bad(field, f"{field}: {bad.reason}")


def _without_nulls(fields: Any) -> Any:
    """A field that is empty in YAML is one that was left out."""
    if not is_mapping(fields):
        return fields
    return {name: _without_nulls(value) for name, value in fields.items() if value is not None}


def _annotations(metadata: _Metadata, text: str) -> dict[str, str]:
    if TASK_TEXT in metadata.annotations:
        raise _Bad(
            f"metadata.annotations.{TASK_TEXT}", f"metadata.annotations: {TASK_TEXT} is kept for the task's text"
        )
    return {**metadata.annotations, TASK_TEXT: text} if text else metadata.annotations


# --- resources ---------------------------------------------------------------------------------------------------


def _requirements(resources: _Resources) -> dict[str, Any]:
    hardware = resources.hardware
    found: dict[str, Any] = {
        "cpus": cpus(hardware.cpu),
        "ram_mb": memory_mb(hardware.memory),
        "labels": _labels(resources.tags),
    }
    if hardware.gpu is not None:
        found["gpus"] = hardware.gpu.count
        if hardware.gpu.count and hardware.gpu.type.lower() not in ("any", ""):
            found["gpu_model"] = hardware.gpu.type
    return found


_CPUS: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(m?)", re.ASCII)
_BYTES: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(?:([KMGT])i?)?B?", re.ASCII | re.IGNORECASE)
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def cpus(quantity: str | float) -> int:
    """Logical CPUs, rounded up: ``8``, ``"8"``, ``0.5``, or thousandths as in ``500m``."""
    found = _CPUS.fullmatch(_plain(quantity))
    if found is None:
        raise _Bad(
            "spec.resources.hardware.cpu",
            f"spec.resources.hardware.cpu: {quantity!r} is no number of CPUs, such as 8 or 500m",
        )
    return math.ceil(float(found[1]) / (1000 if found[2] else 1))


def memory_mb(quantity: str | int) -> int:
    """MiB, rounded up. Units are binary, with or without ``i``, in any case, as MLOC reads them: ``G`` is ``Gi``, 1024³
    bytes. A plain number is bytes."""
    found = _BYTES.fullmatch(_plain(quantity))
    if found is None:
        raise _Bad(
            "spec.resources.hardware.memory",
            f"spec.resources.hardware.memory: {quantity!r} is no amount of memory, such as 32Gi or 512Mi",
        )
    return math.ceil(float(found[1]) * 1024.0 ** (_POWERS[(found[2] or "").upper()] - 2))


def _plain(quantity: str | float) -> str:
    return quantity.strip() if isinstance(quantity, str) else f"{quantity}"


def _labels(tags: list[str] | dict[str, str]) -> dict[str, str]:
    """Tags as the labels that a node with these tags has: ``fast`` is ``fast=true``."""
    if isinstance(tags, dict):
        return tags
    found: dict[str, str] = {}
    for at, tag in enumerate(tags):
        name, equals, value = tag.partition("=")
        if not name.strip():
            raise _Bad(f"spec.resources.tags[{at}]", f"spec.resources.tags[{at}]: {tag!r} is no tag")
        found[name.strip()] = value.strip() if equals else TAG
    return found


def tags_of(labels: Mapping[str, str]) -> list[str]:
    """A node's labels as tags."""
    return [name if value == TAG else f"{name}={value}" for name, value in sorted(labels.items())]


def _unix_s(when: Any, path: str) -> float:
    """Unix seconds, from such or from a date with its time zone."""
    if isinstance(when, int | float) and not isinstance(when, bool):
        return float(when)
    try:
        found = datetime.fromisoformat(str(when))
    except ValueError:
        raise _Bad(path, f"{path}: {when!r} is no time, such as 2030-01-31T12:00:00Z") from None
    if found.tzinfo is None:
        raise _Bad(path, f"{path}: {when!r} has no time zone; end it with Z for UTC")
    try:
        return found.timestamp()
    except OverflowError:
        raise _Bad(path, f"{path}: {when!r} is out of range") from None


# --- payloads ----------------------------------------------------------------------------------------------------


def _passed_on(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What the executor of any other type reads: the parts of ``spec`` that are not the scheduler's."""
    return {name: value for name, value in spec.items() if name not in _OURS}


def _prompts(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The payload of ``inference``: ``spec.inference`` with its prompts, or those of ``spec.data``."""
    told = spec.get("inference")
    if told is not None and not is_mapping(told):
        raise _Bad("spec.inference", "spec.inference: a mapping is expected, with prompts, max_tokens, temperature …")
    payload: dict[str, Any] = _without_nulls(told or {})
    system = [payload.pop(name) for name in _SYSTEM if name in payload]
    given = [name for name in inference.FORMS if name in payload]
    data = spec.get("data")
    if data is not None:
        if given:
            raise _Bad("spec.data", f"spec.data: there is spec.inference.{given[0]} already; give one of them")
        payload["prompts"] = _listed(data)
    elif not given:
        raise _Bad("spec.inference.prompts", "Missing required field: spec.inference.prompts")
    _check(payload, {"prompts": "spec.data.items"} if data is not None else {})
    if not system:
        return payload
    payload = _with_system(payload, system[0])
    _check(payload, {})
    return payload


def _check(payload: dict[str, Any], elsewhere: Mapping[str, str]) -> None:
    """Refuses here what the executor would refuse there.

    Args:
        elsewhere: fields of the payload that come from another place than ``spec.inference``, with that place.
    """
    bad = inference.parse(payload)
    if isinstance(bad, Refused):
        path = elsewhere.get(bad.field, f"spec.inference.{bad.field}")
        raise _Bad(path, f"{path}: {bad.reason}")


def _listed(data: Any) -> list[str]:
    """The prompts in ``spec.data``."""
    found = _part(data, _Data, "spec.data")
    if found.type != "list":
        reason = f"spec.data.type: {found.type!r} is not supported: list the prompts, with type list and items"
        raise _Bad("spec.data.type", reason)
    if not found.items:
        raise _Bad("spec.data.items", "Missing required field: spec.data.items")
    return found.items


def _with_system(payload: dict[str, Any], system: Any) -> dict[str, Any]:
    """A system prompt goes in front of each prompt, as MLOC has it, or before the messages of each chat."""
    path = "spec.inference.system_prompt"
    if not isinstance(system, str):
        raise _Bad(path, f"{path}: text is expected")
    first = {"role": "system", "content": system}
    (form,) = (name for name in inference.FORMS if name in payload)
    told: Any = payload[form]
    if form != "messages":
        made: Any = [f"{system}\n{prompt}" for prompt in told] if is_list(told) else f"{system}\n{told}"
    elif is_list(told[0]):
        made = [[first, *chat] for chat in told]
    else:
        made = [first, *told]
    return {**payload, form: made}
