"""The page at ``/docs``: an edge's OpenAPI document for people.

Rendered here, without scripts and without anything from elsewhere, so it works offline and under the strictest
Content-Security-Policy. Text becomes markup only in :func:`_tag`, which escapes it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any, Final, cast
from urllib.parse import quote, urlencode

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1a1f27; --soft: #566072; --line: #d9dee6; --paper: #fff; --wash: #f4f6f9;
  --link: #0b5cad; --get: #0b6b3a; --post: #0b5cad; --delete: #a3271f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9ba6b6; --line: #333b47; --paper: #14181e;
  --wash: #1d232b; --link: #7ab8ff; --get: #6fd39c; --post: #7ab8ff; --delete: #ff9a92; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 3px; }
code, pre { font: .9em/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.25rem; margin: 3rem 0 0; }
h3 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; } h4 { font-size: .95rem; margin: 1.25rem 0 .25rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.skip { position: absolute; left: -99rem; padding: .5rem 1rem; background: var(--paper); } .skip:focus { left: 0; }
.columns { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
nav ul { list-style: none; margin: .25rem 0 1rem; padding: 0; } nav li { padding: .15rem 0; }
nav h2 { font-size: .85rem; margin: 1rem 0 0; color: var(--soft); } nav a, h3 a { text-decoration: none; }
nav a:hover, h3 a:hover { text-decoration: underline; } nav code { font-size: .84em; }
nav .names { display: flex; flex-wrap: wrap; column-gap: 1.25rem; }
nav li a:has(.method) { display: grid; grid-template-columns: 4.6rem 1fr; }
article { margin-top: 1rem; padding: 1rem 1.25rem; border: 1px solid var(--line); border-radius: .5rem; }
article:target { border-color: var(--link); }
.method { display: inline-block; min-width: 5em; font-weight: 700; font-size: .85em; }
.get { color: var(--get); } .post { color: var(--post); } .delete { color: var(--delete); }
dl { margin: .25rem 0; } dt { margin-top: .5rem; } dd { margin: 0 0 0 1.25rem; color: var(--soft); }
.kind { color: var(--soft); font-size: .9em; }
.must { font-weight: 600; font-size: .85em; }
pre { margin: .35rem 0; padding: .7rem .9rem; background: var(--wash); border-radius: .4rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); }
@media (min-width: 62rem) {
  .columns { display: grid; grid-template-columns: 17rem minmax(0, 1fr); column-gap: 2.5rem; }
  .columns > header { grid-column: 1 / -1; }
  nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto; padding-bottom: 2rem; }
  nav .names { display: block; } }
"""

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""What the page is served with: it may use its own style and nothing else."""

LINE_CHARS: Final = 60
"""Longest message that an example shows on one line."""

Json = Mapping[str, Any]


class _Html(str):
    """Markup. Any other string is text."""

    __slots__ = ()


def render(document: Json, base_url: str, *, token: bool) -> str:
    """The page.

    Args:
        document: what ``/openapi.json`` answers.
        base_url: where the reader reaches the edge; the examples name it.
        token: whether a call must show the mesh's token.
    """
    info = document["info"]
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    # The doors that every edge has take nothing.
    requests = [_operation(*each, base_url, token) for each in operations if "parameters" in each[2]]
    doors = [_operation(*each, base_url, token) for each in operations if "parameters" not in each[2]]
    schemas = [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    head = _tag(
        "head",
        _Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        _tag("title", info["title"]),
        _tag("style", _Html(STYLE)),
    )
    header = _tag(
        "header",
        _tag("h1", info["title"], " ", _tag("span", info["version"], class_="soft")),
        _tag("p", *_prose(info["description"])),
        _tag("p", "Also for programs: ", _link("openapi.json", "/openapi.json"), ", OpenAPI 3.1."),
    )
    main = _tag(
        "main",
        *([_tag("h2", "Requests", id="requests"), *requests] if requests else []),
        _tag("h2", "Common doors", id="doors"),
        *doors,
        _tag("h2", "Schemas", id="schemas"),
        *schemas,
        id="main",
    )
    skip = _tag("a", "Skip to the requests", href="#main", class_="skip")
    body = _tag("body", skip, _tag("div", header, _nav(operations, document), main, class_="columns"))
    return f"<!doctype html>{_tag('html', head, body, lang='en')}"


def _nav(operations: Iterable[tuple[str, str, Json]], document: Json) -> _Html:
    routes = [
        _tag("li", _link([_method(method), _tag("code", path)], f"#{operation['operationId']}"))
        for method, path, operation in operations
    ]
    names = [_tag("li", _link(name, f"#schema-{name}")) for name in document["components"]["schemas"]]
    parts = [_tag("h2", "Routes"), _tag("ul", *routes), _tag("h2", "Schemas"), _tag("ul", *names, class_="names")]
    return _tag("nav", *parts, aria_label="Contents")


def _operation(method: str, path: str, operation: Json, base_url: str, token: bool) -> _Html:
    shown = _tag("code", path)
    opens = method == "get" and "{" not in path and not token
    parts = [_tag("h3", _method(method), _link(shown, path) if opens else shown)]
    parts.append(_tag("p", *_prose(operation["summary"])))
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if parameters := operation.get("parameters"):
        fields = [part for p in parameters for part in _field(p["name"], p, p["required"], f"in the {p['in']}")]
        parts += [_tag("h4", "Parameters"), _tag("dl", *fields)]
    if body:
        must = "required" if operation["requestBody"]["required"] else "may be left out"
        texts = [kind for kind in operation["requestBody"]["content"] if kind != "application/json"]
        instead = [part for kind in texts for part in (" or ", _tag("code", kind))]
        parts += [
            _tag("h4", "Body"),
            _tag("p", *_kind(body["schema"]), *instead, " ", _tag("span", must, class_="kind")),
        ]
    parts += [_tag("h4", "Answers"), *_answers(operation["responses"])]
    parts += [_tag("h4", "With curl"), _command(_curl(method, path, operation, base_url, token))]
    if subject := operation.get("x-nats-subject"):
        parts += [
            _tag("h4", "The same on the bus"),
            _command(f"nats request {shlex.quote(subject)} {_quoted(_example_of(operation))}"),
        ]
    return _tag("article", *parts, id=operation["operationId"])


def _method(method: str) -> _Html:
    return _tag("span", method.upper(), class_=f"method {method}")


def _answers(responses: Json) -> Iterator[_Html]:
    """What is answered; refusals, the same for most requests, folded away."""
    refusals = {status: each for status, each in responses.items() if _is_refusal(each)}
    said = [part for status, each in responses.items() if status not in refusals for part in _answer(status, each)]
    yield _tag("dl", *said)
    listed = [part for status, answer in refusals.items() for part in _answer(status, answer)]
    yield _tag("details", _tag("summary", f"Refusals: {', '.join(refusals)}"), _tag("dl", *listed))


def _is_refusal(answer: Json) -> bool:
    schemas = [content["schema"].get("$ref", "") for content in answer["content"].values()]
    return any(schema.endswith(("/Problem", "/ApiRefusal")) for schema in schemas)


def _answer(status: str, answer: Json) -> Iterator[_Html]:
    kinds = [part for content in answer["content"].values() for part in (" or ", *_kind(content["schema"]))][1:]
    yield _tag("dt", _tag("code", status), " ", *kinds)
    yield _tag("dd", *_prose(answer["description"]))


def _command(text: str) -> _Html:
    return _tag("pre", _tag("code", text))


def _example_of(operation: Json) -> dict[str, Any]:
    """The example of a request, wherever its fields go over HTTP."""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    given = {p["name"]: p["example"] for p in operation.get("parameters", ()) if "example" in p}
    return {**given, **body.get("example", {})}


def _curl(method: str, path: str, operation: Json, base_url: str, token: bool) -> str:
    """The request's example as a command for a shell."""
    query: list[tuple[str, str]] = []
    for parameter in operation.get("parameters", ()):
        if "example" in parameter:
            name, value = parameter["name"], parameter["example"]
            if parameter["in"] == "path":
                path = path.replace(f"{{{name}}}", quote(_text(value), safe=""))
            else:
                query += _in_query(name, value)
    url = base_url + path + (f"?{urlencode(query)}" if query else "")
    command = ["curl", "-s"] + ([] if method == "get" else ["-X", method.upper()]) + [shlex.quote(url)]
    if token and operation.get("security") != []:
        command += ["-H", '"Authorization: Bearer $COMPUTEMESH_TOKEN"']
    if "requestBody" in operation:
        command += ["-H", "'Content-Type: application/json'", "-d", _quoted(_example_of(operation))]
    return " ".join(command)


def _in_query(name: str, value: Any) -> list[tuple[str, str]]:
    """A value as parameters: once for each item of a list, and ``name[key]`` for those of an object."""
    if isinstance(value, list):
        return [(name, _text(item)) for item in value]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, dict):
        return [(f"{name}[{key}]", _text(item)) for key, item in value.items()]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return [(name, _text(value))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(message: dict[str, Any]) -> str:
    """A message as one word of a shell command, on a line for each field when it is long."""
    text = json.dumps(message, ensure_ascii=False)
    if len(text) > LINE_CHARS:
        lines = (f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in message.items())
        text = "{\n" + ",\n".join(lines) + "\n}"
    return shlex.quote(text)


# --- schemas ---------------------------------------------------------------------------------------------------


def _schema(name: str, schema: Json) -> _Html:
    parts = [_tag("h3", _tag("code", name))]
    if about := schema.get("description"):
        parts.append(_tag("p", *_prose(about)))
    if "properties" in schema:
        required = schema.get("required", ())
        fields = [
            part for field, inner in schema["properties"].items() for part in _field(field, inner, field in required)
        ]
        parts.append(_tag("dl", *fields) if fields else _tag("p", "No fields.", class_="soft"))
    else:
        parts.append(_tag("p", *_kind(schema)))
    return _tag("article", *parts, id=f"schema-{name}")


def _field(name: str, field: Json, required: bool, where: str = "") -> Iterator[_Html]:
    """A field of a schema, or a parameter, which has its schema inside."""
    schema = field.get("schema", field)
    default = schema.get("default")
    notes = [*([where] if where else []), *_bounds(schema)]
    if default not in (None, "", []) and not isinstance(default, dict):
        notes.append(f"default {json.dumps(default, ensure_ascii=False)}")
    kind = _tag("span", *_kind(schema), *(f", {note}" for note in notes), class_="kind")
    must = [" ", _tag("span", "required", class_="must")] if required else []
    yield _tag("dt", _tag("code", name), " ", kind, *must)
    if about := field.get("description"):
        yield _tag("dd", *_prose(about))


_BOUNDS: Final = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "minLength": "at least {} long",
    "maxLength": "at most {} long",
    "maxItems": "at most {} of them",
    "maxProperties": "at most {} of them",
}


def _bounds(schema: Json) -> Iterator[str]:
    for part in (schema, *schema.get("anyOf", ())):
        yield from (text.format(part[name]) for name, text in _BOUNDS.items() if name in part)


def _kind(schema: Json) -> list[object]:
    """What a schema takes, in words, with links to the schemas it names."""
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return [_link(name, f"#schema-{name}")]
    if "anyOf" in schema:
        kinds = [_kind(part) for part in schema["anyOf"]]
        return [part for at, kind in enumerate(kinds) for part in ([" or ", *kind] if at else kind)]
    if "enum" in schema:
        return [" | ".join(map(str, schema["enum"]))]
    if schema.get("type") == "array":
        return ["list of ", *_kind(schema.get("items", {}))]
    if isinstance(values := schema.get("additionalProperties"), dict):
        return ["map of text to ", *_kind(cast("Json", values))]
    return [schema.get("type", "anything")]


# --- markup ----------------------------------------------------------------------------------------------------


def _tag(name: str, *children: object, **attributes: str) -> _Html:
    """An element. What is not markup already is escaped; ``class_`` is ``class``, ``aria_label`` is ``aria-label``."""
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    inner = "".join(child if isinstance(child, _Html) else escape(str(child)) for child in children)
    return _Html(f"<{name}{shown}>{inner}</{name}>")


def _link(shown: object, href: str) -> _Html:
    parts = cast("list[object]", shown) if isinstance(shown, list) else [shown]
    return _tag("a", *parts, href=href)


def _prose(text: str) -> list[object]:
    """Text in which what stands between backticks is code."""
    return [_tag("code", part) if at % 2 else part for at, part in enumerate(text.replace("``", "`").split("`"))]
