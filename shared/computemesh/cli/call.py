"""``call``: any request of the contracts, by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import click
import msgspec

from computemesh import trace
from computemesh.bus import BusError, NoResponder
from computemesh.bus.connection import read_answer
from computemesh.cli import common, complete, intake, subjects
from computemesh.cli.common import Failure, err, is_mapping, print_json, table
from computemesh.contracts.base import Refused, Request, Role, encode
from computemesh.contracts.catalog import requests
from computemesh.ids import is_token
from computemesh.yamltext import Document

TIMEOUT_S: Final = 10.0


@click.command()
@click.argument("subject", required=False, shell_complete=complete.request_names)
@click.argument("question", required=False, metavar="[JSON|-|@FILE]")
@click.option(
    "--target", "-t", help="Whom it is for, where the subject ends in an id.", shell_complete=complete.node_ids
)
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    default=Role.CLIENT.value,
    show_default=True,
    help="As whom to ask, with the credentials of the mesh on this machine.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=TIMEOUT_S,
    show_default=True,
    help="How long to wait for the answer, in seconds.",
)
@click.option("--raw", is_flag=True, help="Any subject, also outside the contracts; nothing is checked.")
@click.option("--list", "list_all", is_flag=True, help="Show what can be called.")
@click.option("--schema", is_flag=True, help="Show what SUBJECT takes and gives, and call nothing.")
@click.option("--verbose", "-v", is_flag=True, help="Say on standard error what is asked, and under which trace id.")
@click.option("--json", "as_json", is_flag=True, help="JSON for --list, --schema and errors; answers always are.")
def call(
    subject: str | None,
    question: str | None,
    target: str | None,
    role: str,
    timeout: float,
    raw: bool,
    list_all: bool,
    schema: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Ask the mesh anything: send a request and print the answer.

    SUBJECT is a request's name, short (`nodes.query`) or in full (`compute.nodes.query.v1`). The question is
    JSON (YAML will do), from the command line, from standard input with `-`, or from a file with `@FILE`. It is
    checked before it is sent.

    \b
      computemesh call --list
      computemesh call work.list --schema
      computemesh call nodes.query '{"online_only": true}'
      computemesh call resources.get --target my-node
      computemesh call work.request @item.yaml

    Exit status: 0 answered, 2 refused, 3 nobody answers.
    """
    if list_all:
        show_list(as_json=as_json)
    elif subject is None:
        raise click.UsageError("give a SUBJECT, or --list")
    elif raw:
        _print_reply(common.run(_call_raw(subject, _raw_data(question), Role(role), timeout, verbose)))
    else:
        contract, named_target = _contract(subject)
        if schema:
            show_schema(contract, as_json=as_json)
            return
        address = _address(contract, named_target or target or "")
        _check_role(contract, role)
        asked = _question(contract, question)
        print_json(common.run(_call(contract, address, encode(asked), Role(role), timeout, verbose)))


def _contract(name: str) -> tuple[Request[Any, Any], str]:
    found = subjects.find_request(name)
    if found is None:
        raise unknown(name)
    return found


def _check_role(contract: Request[Any, Any], role: str) -> None:
    if Role(role) not in contract.asked_by:
        may = ", ".join(sorted(contract.asked_by))
        raise Failure(
            f"{subjects.short(contract.subject)} is asked by {may}, not by {role}",
            hint=f"add --role {min(contract.asked_by)}",
            field="role",
            code="wrong_role",
        )


def unknown(name: str) -> Failure:
    known = [subjects.short(request.subject) for request in requests()]
    near = subjects.near(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else "`computemesh call --list` shows all; --raw calls any"
    return Failure(f"{name}: no such request", hint=hint, field="subject", code="unknown_subject")


def _question(contract: Request[Any, Any], given: str | None) -> Any:
    """The checked question; nothing given is a question without fields."""
    found = intake.documents(*_given(given))
    if len(found) > 1:
        raise Failure("one question at a time: this holds several documents", code="bad_file")
    where, document = found[0] if found else ("", Document({}))
    fields = document.value
    if not is_mapping(fields):
        raise Failure(f"{where}: a question is a mapping of fields", code="bad_file")
    return intake.message(fields, contract.takes, placed=document.place)


def _given(question: str | None) -> tuple[bytes, str]:
    if question is None:
        return b"{}", "the question"
    if question == "-":
        return intake.read_bytes("-"), "standard input"
    if question.startswith("@"):
        return intake.read_bytes(question[1:]), question[1:]
    return question.encode("utf-8", "surrogateescape"), "the question"


def _raw_data(question: str | None) -> bytes:
    return b"" if question is None else _given(question)[0]


def _address(contract: Request[Any, Any], target: str) -> str:
    name = subjects.short(contract.subject)
    if contract.target and not target:
        raise Failure(
            f"{contract.target}: {name} is for one target", hint=f"say --target {contract.target.upper()}",
            field="target", code="no_target",
        )  # fmt: skip
    if target and not contract.target:
        raise Failure(f"{name} takes no target", field="target", code="bad_target")
    if target and not is_token(target):
        raise Failure(
            f"{contract.target}: {target!r} is no id", hint="an id is one token of letters, digits, '_' and '-'",
            field="target", code="bad_target",
        )  # fmt: skip
    return contract.at(target)


async def _call(
    contract: Request[Any, Any], address: str, data: bytes, role: Role, timeout_s: float, verbose: bool
) -> Any:
    """The answer as JSON values: also what a newer mesh says that our contracts do not know."""
    reply, headers = await _send(address, data, role, timeout_s, verbose)
    answer = read_answer(contract, reply, headers)
    if isinstance(answer, Refused):
        raise common.refusal(answer)
    return msgspec.json.decode(reply)


async def _call_raw(address: str, data: bytes, role: Role, timeout_s: float, verbose: bool) -> bytes:
    if not subjects.is_subject(address) or "*" in address.split(".") or address.endswith(">"):
        raise Failure(f"{address}: not a subject one can ask", field="subject", code="bad_subject")
    reply, headers = await _send(address, data, role, timeout_s, verbose)
    if "Nats-Service-Error" in headers:
        raise Failure(headers["Nats-Service-Error"], code=headers.get("Nats-Service-Error-Code", ""))
    return reply


async def _send(
    address: str, data: bytes, role: Role, timeout_s: float, verbose: bool
) -> tuple[bytes, Mapping[str, str]]:
    here = trace.current() or trace.begin()
    denied: list[str] = []
    async with common.connected(role, on_denied=denied.append) as bus:
        if verbose:
            what = f"{address} as {bus.where.role}, trace id {here.trace_id}: {data.decode()}"
            err.print(f"[dim]{common.escape(what)}[/]")
        try:
            # A server that denies a subject says so at once, and the request would wait for nothing.
            reply = await common.unless(lambda: bool(denied), bus.call(address, data, timeout_s=timeout_s))
        except NoResponder:
            raise common.silent(f"{address}: nobody answers there now") from None
        except BusError as error:
            raise common.silent(str(error)) from None
        if reply is None:
            raise Failure(f"{address}: the role {bus.where.role} may not ask this", field="subject", code="denied")
        return reply.data, reply.headers or {}


def _print_reply(reply: bytes) -> None:
    try:
        print_json(msgspec.json.decode(reply))
    except (ValueError, RecursionError):
        click.echo(reply)


# --- what can be called --------------------------------------------------------------------------------------


def show_list(*, as_json: bool) -> None:
    """Every request of the contracts."""
    if as_json:
        print_json([_described(request) for request in requests()])
        return
    rows = [
        (subjects.short(r.subject) + (f".<{r.target}>" if r.target else ""), r.takes.__name__, r.gives.__name__,
         ", ".join(sorted(r.asked_by)), r.about)
        for r in requests()
    ]  # fmt: skip
    table(["request", "takes", "gives", "asked by", "what"], rows)


def _described(request: Request[Any, Any]) -> dict[str, Any]:
    return {
        "name": subjects.short(request.subject),
        "subject": request.subject,
        "target": request.target,
        "takes": request.takes.__name__,
        "gives": request.gives.__name__,
        "asked_by": sorted(request.asked_by),
        "about": request.about,
    }


def show_schema(request: Request[Any, Any], *, as_json: bool) -> None:
    """What one request takes and gives: the fields for people, JSON Schema for programs."""
    schemas, components = msgspec.json.schema_components([request.takes, request.gives])
    if as_json:
        takes, gives = schemas
        print_json({**_described(request), "takes": takes, "gives": gives, "$defs": components})
        return
    common.out.print(f"[bold]{request.at('*' if request.target else '')}[/]  {common.escape(request.about)}\n")
    for word, kind in (("takes", request.takes), ("gives", request.gives)):
        common.out.print(f"[bold]{word} {kind.__name__}[/]")
        rows = [
            (name, shape["type"], "required" if name in required else shape["default"], shape["about"])
            for name, shape, required in _fields(components[kind.__name__], components)
        ]
        if rows:
            table(["field", "type", "default", ""], rows)
        else:
            common.out.print("nothing")
        common.out.print()


def _fields(schema: Mapping[str, Any], components: Mapping[str, Any]) -> list[tuple[str, dict[str, str], list[str]]]:
    required: list[str] = schema.get("required", [])
    return [
        (name, _shape(cast("dict[str, Any]", shape), components), required)
        for name, shape in schema.get("properties", {}).items()
    ]


def _shape(shape: Mapping[str, Any], components: Mapping[str, Any]) -> dict[str, str]:
    default = msgspec.json.encode(shape["default"]).decode() if "default" in shape else ""
    return {"type": _kind(shape, components), "default": default, "about": shape.get("description", "")}


def _kind(shape: Mapping[str, Any], components: Mapping[str, Any]) -> str:
    """A JSON Schema in a few words."""
    if "$ref" in shape:
        name = shape["$ref"].rpartition("/")[2]
        choices = components.get(name, {}).get("enum")
        return " | ".join(map(str, choices)) if choices else name
    if "anyOf" in shape:
        return " | ".join(_kind(part, components) for part in shape["anyOf"])
    if "enum" in shape:
        return " | ".join(map(str, shape["enum"]))
    kind = str(shape.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(shape.get('items', {}), components)}"
    if kind == "object" and "additionalProperties" in shape:
        return "mapping"
    least = shape.get("minimum", shape.get("exclusiveMinimum"))
    most = shape.get("maximum", shape.get("exclusiveMaximum"))
    return f"{kind} {least} to {most}" if least is not None and most is not None else kind
