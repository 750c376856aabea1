"""``keys``: who may use the OpenAI interface of the gateways, and how much."""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec
from rich.text import Text

from computemesh.bus import Bus
from computemesh.cli import common, complete, tables
from computemesh.cli.common import err, out, print_json
from computemesh.cli.tables import Cell, Column
from computemesh.cli.times import Moment, date
from computemesh.contracts import keys
from computemesh.contracts.base import Refused, Role, convert
from computemesh.contracts.keys import KeyCreate, KeyRecord, KeyRevoke, KeysList
from computemesh.ids import is_token

COLUMNS = (
    Column(title="key", least=12),
    Column(title="requests/min", right=True, rank=3),
    Column(title="tokens/min", right=True, rank=2),
    Column(title="at once", right=True, rank=4),
    Column(title="models", rank=1, least=16),
    Column(title="expires"),
    Column(title="created", rank=5),
)


class KeyName(click.ParamType[str]):
    """The name of a key, checked."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_token(value):
            self.fail(f"{value!r} is no name: one token of letters, digits, '_' and '-', 1 to 63 long", param, ctx)
        return value


@click.group(name="keys", cls=common.Ordered)
def keys_group() -> None:
    """API keys of the gateways' OpenAI interface: create, list, revoke.

    While there is no key, a gateway on loopback is open to everyone on this machine. With the first one, `/v1/*`
    of every gateway demands a key, or the mesh's token (`computemesh env`).

    \b
      export OPENAI_API_KEY=$(computemesh keys create alice --rpm 60 --tpm 20000 --expires 30d)
      computemesh keys list
      computemesh keys revoke alice
    """


@keys_group.command()
@click.argument("name", type=KeyName())
@click.option("--rpm", "requests_per_minute", type=click.IntRange(1), help="Requests per minute, at most.")
@click.option(
    "--tpm", "tokens_per_minute", type=click.IntRange(1), help="Tokens per minute, at most: prompts and answers."
)
@click.option("--concurrent", type=click.IntRange(1), help="Requests at the same time, at most.")
@click.option(
    "--model", "models", multiple=True, shell_complete=complete.models,
    help="Only this model; may be given more than once. Left out, any.",
)  # fmt: skip
@click.option("--expires", "expires_at", type=Moment(), metavar="WHEN", help="In 12h, 30d …, or on a date: 2030-01-31.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def create(name: str, as_json: bool, **limits: Any) -> None:
    """Create a key, and print it: this once, as only its digest is kept.

    Each gateway counts the limits for itself.
    """
    key = keys.new_key()
    fields = {field: value for field, value in limits.items() if value is not None}
    asked = convert({**fields, "models": list(limits["models"]), "name": name, "digest": keys.digest(key)}, KeyCreate)
    if isinstance(asked, Refused):
        raise common.refusal(asked)
    if asked.expires_at is not None and asked.expires_at <= time.time():
        raise common.Failure("--expires is in the past", field="expires_at")
    record = common.once(lambda bus: common.ask(bus, keys.CREATE, asked), Role.SERVICES)
    if as_json:
        print_json({"key": key, **_shown(record)})
        return
    click.echo(key)
    err.print(
        f"[dim]This is key {record.name}. It is shown this once; `computemesh keys revoke {record.name}` ends it.[/]"
    )


@keys_group.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_keys(as_json: bool) -> None:
    """List the keys and their limits."""
    found = common.once(_every_key, Role.SERVICES)
    if as_json:
        print_json({"keys": [_shown(record) for record in found], "count": len(found)})
        return
    if not found:
        out.print("No keys: gateways on loopback are open. `computemesh keys create NAME` makes one.")
        return
    tables.show(COLUMNS, [row(record, time.time()) for record in found])


async def _every_key(bus: Bus) -> list[KeyRecord]:
    found: list[KeyRecord] = []
    ask = KeysList()
    while True:
        page = await common.ask(bus, keys.LIST, ask)
        found += page.keys
        if not page.next:
            return found
        ask = KeysList(after=page.next)


def row(record: KeyRecord, now: float) -> tuple[Cell, ...]:
    """A key in a line."""
    limits = (record.requests_per_minute, record.tokens_per_minute, record.concurrent)
    return (
        record.name,
        *(f"{limit:,}" if limit is not None else "-" for limit in limits),
        ", ".join(record.models) or "any",
        _expiry(record.expires_at, now),
        date(record.created_at),
    )


def _expiry(at: float | None, now: float) -> Text:
    if at is None:
        return Text("never")
    return Text(f"in {common.lasting(at - now)}") if at > now else Text("expired", "red")


def _shown(record: KeyRecord) -> dict[str, Any]:
    """A key for programs; its digest is for gateways alone."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    del fields["digest"]
    return fields


@keys_group.command()
@click.argument("name", type=KeyName(), shell_complete=complete.keys)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def revoke(name: str, as_json: bool) -> None:
    """End a key: gateways refuse it within seconds. What was begun with it is finished."""
    answer = common.once(lambda bus: common.ask(bus, keys.REVOKE, KeyRevoke(name=name)), Role.SERVICES)
    if as_json:
        print_json(answer)
        return
    out.print(f"Key {answer.name} opens nothing any more.")
    if not answer.left:
        err.print("[bold yellow]No key is left:[/] gateways on loopback are open to everyone on this machine.")
