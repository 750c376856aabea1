"""The OpenAPI 3.1 document of an edge, derived from the contracts it serves."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from computemesh import __version__
from computemesh.contracts.base import AnyBound, Http, Refused

_PATH_FIELD: Final = re.compile(r"{(\w+)}")


def document(title: str, about: str, bounds: list[AnyBound]) -> dict[str, Any]:
    """The document for these endpoints. Payload types become schemas, refusals problem details."""
    routed = [bound for bound in bounds if bound.contract.http]
    kinds: list[type[Any]] = [Refused]
    for bound in routed:
        kinds += [bound.contract.takes, bound.contract.gives]
    unique = list(dict.fromkeys(kinds))
    refs, schemas = msgspec.json.schema_components(unique, ref_template="#/components/schemas/{name}")
    ref_of = dict(zip(unique, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for bound in routed:
        for route in bound.contract.http:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(bound, route, ref_of, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "description": about},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def _operation(
    bound: AnyBound, route: Http, ref_of: dict[type[Any], dict[str, Any]], schemas: dict[str, Any]
) -> dict[str, Any]:
    contract = bound.contract
    in_path = _PATH_FIELD.findall(route.path)
    fields: dict[str, Any] = schemas[contract.takes.__name__].get("properties", {})
    operation: dict[str, Any] = {
        "summary": contract.about,
        "operationId": f"{route.method.lower()}_{contract.subject.replace('.', '_')}",
        "description": f"The same as a request on `{contract.subject}`.",
        "parameters": [{"name": name, "in": "path", "required": True, "schema": fields[name]} for name in in_path],
        "responses": {
            str(route.status): _content("application/json", ref_of[contract.gives], "The answer."),
            "default": _content("application/problem+json", ref_of[Refused], "Refused, and why."),
        },
    }
    if route.method == "POST":
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": ref_of[contract.takes]}},
        }
    else:
        operation["parameters"] += [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in fields.items()
            if name not in in_path
        ]
    return operation


def _content(kind: str, schema: dict[str, Any], about: str) -> dict[str, Any]:
    return {"description": about, "content": {kind: {"schema": schema}}}
