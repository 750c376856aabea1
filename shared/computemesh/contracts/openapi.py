"""The OpenAPI 3.1 document of a service's HTTP edge, derived from the requests it answers.

The edge serves it as ``/openapi.json``, ``make docs`` writes it to ``docs/reference/openapi``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, get_args, get_origin

import msgspec

from computemesh import __version__
from computemesh.contracts.base import Event, Http, Message, Refusal, Refused, Request, Route, ServiceCard
from computemesh.contracts.schemas import schemas_of

AnyRequest = Request[Any, Any]

_PATH_FIELD: Final = re.compile(r"{(\w+)}")
_REF: Final = "#/components/schemas/{name}"
_REFERENCE: Final = re.compile(r'"#/components/schemas/(\w+)"')


class Problem(Message, frozen=True, kw_only=True):
    """A refusal over HTTP: RFC 9457 problem details."""

    type: str
    """`urn:computemesh:` and the code."""
    title: str
    status: int
    detail: str
    """One sentence for a person, with the numbers that decided."""
    code: str
    """Machine-readable, `snake_case`."""
    field: str
    """Path of the field at fault; empty when no single field is."""
    retry: str
    """Whether asking again helps: `never`, `later`, or `elsewhere`."""
    trace_id: str = ""
    """W3C trace id of the request, which the service's log lines about it have too."""


def problem_of(answer: Refused, trace_id: str = "") -> Problem:
    """A refusal as it is said over HTTP."""
    return Problem(
        type=f"urn:computemesh:{answer.code}",
        title=answer.code.replace("_", " "),
        status=answer.status,
        detail=answer.reason,
        code=answer.code,
        field=answer.field,
        retry=answer.retry,
        trace_id=trace_id,
    )


# --- what may be refused anywhere ------------------------------------------------------------------------------

_ANYWHERE: Final = (
    Refusal(code="bad_origin", status=403, when="a page of another origin calls"),
    Refusal(code="bad_host", status=421, when="on loopback, the edge was called by a name that is not this machine's"),
)
_ENTERED: Final = (
    Refusal(code="no_token", status=401, when="beyond loopback, the call has no bearer token"),
    Refusal(code="bad_token", status=403, when="the bearer token is not that of this mesh"),
    *_ANYWHERE,
)
_ASKED: Final = (
    Refusal(code="bad_message", status=400, when="the request is not as described here; `field` says where"),
    *_ENTERED,
    Refusal(code="too_large", status=413, when="the body is larger than 1 MiB"),
    Refusal(code="bad_content_type", status=415, when="there is a body that is not declared as `application/json`"),
    Refusal(code="internal", status=500, when="the service failed; its log says why"),
    Refusal(code="unavailable", status=503, when="the bus, or the replica that acts, is away"),
)


# --- the document ----------------------------------------------------------------------------------------------


def document(card: ServiceCard, requests: Sequence[AnyRequest], routes: Sequence[Route] = ()) -> dict[str, Any]:
    """The document of the edge of a service that answers *requests* and, over HTTP alone, *routes*."""
    routed = [request for request in requests if request.http]
    kinds = [kind for request in routed for kind in (request.takes, request.gives)]
    said = [(route.takes, _item_kind(route.gives), route.refused_as or Problem) for route in routes]
    kinds += [kind for each in said for kind in each if kind is not Any]
    schemas = schemas_of(list(dict.fromkeys([*kinds, Problem])), _REF)
    paths: dict[str, dict[str, Any]] = {}
    for request in routed:
        for route in request.http:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(request, route, schemas)
    for other in routes:
        paths.setdefault(other.http.path, {})[other.http.method.lower()] = _operation_of(other, schemas)
    paths |= _doors()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"computemesh {card.name}",
            "version": __version__,
            "description": _about(card, requests),
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [
            {"url": "/", "description": "The edge that serves this document."},
            {
                "url": "http://{host}:{port}",
                "description": "Where it is unless it was told otherwise.",
                "variables": {"host": {"default": "127.0.0.1"}, "port": {"default": str(card.port)}},
            },
        ],
        "paths": paths,
        "components": {
            "schemas": _named_in(paths, schemas),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "`COMPUTEMESH_TOKEN`. Demanded where the edge is bound beyond loopback.",
                }
            },
        },
        "security": [{}, {"token": []}],
    }


def _about(card: ServiceCard, requests: Sequence[AnyRequest]) -> str:
    bus_only = [f"`{subject(request)}`" for request in requests if not request.http]
    return card.about + (f" Answered on the bus alone: {', '.join(bus_only)}." if bus_only else "")


def subject(contract: Event[Any] | AnyRequest) -> str:
    """The subject of a contract, with its target as ``<name>``."""
    return f"{contract.subject}.<{contract.target}>" if contract.target else contract.subject


def _named_in(paths: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas that the paths refer to, and those that these refer to, in their order."""
    named: set[str] = set()
    waiting = _references(paths)
    while waiting:
        name = waiting.pop()
        if name not in named:
            named.add(name)
            waiting += _references(schemas[name])
    return {name: schema for name, schema in schemas.items() if name in named}


def _references(value: dict[str, Any]) -> list[str]:
    return _REFERENCE.findall(msgspec.json.encode(value).decode())


def _operation(request: AnyRequest, route: Http, schemas: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": request.about,
        "description": f"The same as a request on `{subject(request)}`.",
        "operationId": f"{route.method.lower()}_{request.subject.replace('.', '_')}",
        "x-nats-subject": subject(request),
        "parameters": _parameters(request.takes, route, schemas, _said(request.example)),
        "responses": {
            str(route.status): _json(_about_answer(request.gives, schemas), request.gives),
            **_refused([*_ASKED, *request.refuses]),
        },
    }
    if route.method == "POST":
        operation["requestBody"] = {
            "required": any(field.required for field in msgspec.structs.fields(request.takes)),
            "content": {"application/json": {"schema": _ref(request.takes), "example": _said(request.example)}},
        }
    return operation


def _operation_of(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    in_path = _PATH_FIELD.findall(route.http.path)
    example = _said(route.example)
    answer = _json(_about_answer(route.gives, schemas), route.gives)
    if route.gives_text:
        answer["content"]["text/plain"] = {"schema": {"type": "string"}}
    if route.gives_events:
        answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    refused = (
        _refused(route.refuses, route.refused_as, "application/json")
        if route.refused_as
        else _refused([*_ASKED, *route.refuses])
    )
    operation: dict[str, Any] = {
        "summary": route.about,
        "operationId": route.name,
        "parameters": _parameters(route.takes, route.http, schemas, example),
        "responses": {str(route.http.status): answer, **refused},
    }
    if route.http.method == "POST":
        said = {name: value for name, value in example.items() if name not in in_path}
        content: dict[str, Any] = {"application/json": {"schema": _ref(route.takes), "example": said}}
        content |= {kind: {"schema": {"type": "string"}} for kind in route.texts}
        needed = any(field.required for field in msgspec.structs.fields(route.takes) if field.name not in in_path)
        operation["requestBody"] = {"required": needed or bool(route.texts), "content": content}
    return operation


def _parameters(
    takes: type[Message], route: Http, schemas: dict[str, Any], example: dict[str, Any]
) -> list[dict[str, Any]]:
    fields: dict[str, Any] = schemas[takes.__name__]["properties"]
    in_path = _PATH_FIELD.findall(route.path)
    in_query = [] if route.method == "POST" else [name for name in fields if name not in in_path]
    return [
        _parameter(name, where, fields[name], example)
        for where, names in (("path", in_path), ("query", in_query))
        for name in names
    ]


def _item_kind(gives: Any) -> Any:
    """The type of an answer, or of the elements of one that is a list."""
    return get_args(gives)[0] if get_origin(gives) is list else gives


def _about_answer(gives: Any, schemas: dict[str, Any]) -> str:
    about: str = "" if gives is Any else schemas[_item_kind(gives).__name__].get("description", "")
    return about or "The answer."


def _parameter(name: str, where: str, schema: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    schema = dict(schema)
    parameter: dict[str, Any] = {"name": name, "in": where, "required": where == "path"}
    if about := schema.pop("description", ""):
        parameter["description"] = about
    parameter["schema"] = schema
    if schema.get("type") == "object":
        parameter |= {"style": "deepObject", "explode": True}  # labels[zone]=a
    if name in example:
        parameter["example"] = example[name]
    return parameter


def _said(example: Message | None) -> dict[str, Any]:
    """The fields of an example that say something: those that are not as they are by default."""
    return _without_defaults(example) if example is not None else {}


def _without_defaults(message: msgspec.Struct) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for field in msgspec.structs.fields(type(message)):
        value = getattr(message, field.name)
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if value != default:
            said[field.encode_name] = _plain(value)
    return said


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return _without_defaults(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return msgspec.to_builtins(value)


def _refused(
    refusals: Sequence[Refusal], kind: type[Message] = Problem, media_type: str = "application/problem+json"
) -> dict[str, Any]:
    """A response for each status, with the codes it may have."""
    responses: dict[str, Any] = {}
    for status in sorted({refusal.status for refusal in refusals}):
        reasons = [f"`{refusal.code}`: {refusal.when}." for refusal in refusals if refusal.status == status]
        responses[str(status)] = _json(" ".join(reasons), kind, media_type)
        if status in (429, 503):
            responses[str(status)]["headers"] = {
                "Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}
            }
    return responses


def _ref(kind: Any) -> dict[str, Any]:
    if kind is Any:
        return {}
    if get_origin(kind) is list:
        return {"type": "array", "items": _ref(_item_kind(kind))}
    return {"$ref": _REF.format(name=kind.__name__)}


def _json(about: str, kind: Any, media_type: str = "application/json") -> dict[str, Any]:
    return {"description": about, "content": {media_type: {"schema": _ref(kind)}}}


# --- the doors that every edge has -----------------------------------------------------------------------------


def _doors() -> dict[str, Any]:
    text, flag = {"type": "string"}, {"type": "number"}
    health = {
        "status": text,
        "ok": {"type": "boolean"},
        "service": text,
        "nats": text,
        "problem": text,
        "uptime_s": flag,
    }
    ready = {"status": text, "reason": text}
    return {
        "/healthz": _door(
            "healthz",
            "Whether the process and its loops are alive.",
            {"200": _facts("Alive.", health), "503": _facts("Failing; `problem` says why.", health)},
        ),
        "/readyz": _door(
            "readyz",
            "Whether it can serve now.",
            {"200": _facts("It can.", ready), "503": _facts("Not now; `reason` says why.", ready)},
        ),
        "/metrics": _door(
            "metrics",
            "Metrics for Prometheus.",
            {"200": {"description": "Text format.", "content": {"text/plain": {"schema": text}}}},
        ),
        "/openapi.json": _door("openapi", "This document.", {"200": _facts("OpenAPI 3.1.", {})}, closed=True),
        "/docs": _door(
            "docs",
            "This document as a page.",
            {"200": {"description": "A page.", "content": {"text/html": {"schema": text}}}},
            closed=True,
        ),
    }


def _door(name: str, about: str, responses: dict[str, Any], *, closed: bool = False) -> dict[str, Any]:
    """One door. Those that are not *closed* are answered to anybody, token or not."""
    operation = {
        "summary": about,
        "operationId": name,
        "responses": {**responses, **_refused(_ENTERED if closed else _ANYWHERE)},
    }
    return {"get": operation if closed else {**operation, "security": []}}


def _facts(about: str, properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"description": about, "content": {"application/json": {"schema": schema}}}
