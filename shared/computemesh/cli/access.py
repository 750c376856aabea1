"""Who may connect: ``nodes invite``, ``nodes revoke`` and ``nats-config``."""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Coroutine
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

import click

from computemesh.addresses import servers_of, with_login
from computemesh.bus import Where
from computemesh.cli import common
from computemesh.cli.common import Failure, err, out, print_json
from computemesh.contracts.base import Role
from computemesh.ids import is_token
from computemesh.nats_server import (
    BadCredentialsError,
    ServerError,
    addresses,
    admit_node,
    expel_node,
    load_or_create,
    render_accounts,
)
from computemesh.paths import home
from computemesh.supervisor import MeshStatus, read_status

T = TypeVar("T")

EXTERNAL_HINT: Final = (
    "The NATS server is not ours: give it what `computemesh nats-config` prints, and have it reload its configuration."
)


class NodeName(click.ParamType[str]):
    """A node id, checked."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_token(value):
            self.fail(f"{value!r} is no node id: one token of letters, digits, '_' and '-', 1 to 63 long", param, ctx)
        return value


class _Address(click.ParamType[str]):
    """Where a NATS server is, or each server of a cluster, without credentials."""

    name = "address"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return ",".join(self._server(server, param, ctx) for server in servers_of(value) or [value])

    def _server(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parts = urlsplit(value)
            host, port = parts.hostname, parts.port or 4222
        except ValueError:
            return self.fail(f"{value!r} is no address of a server: write nats://HOST:PORT", param, ctx)
        if not host or parts.username is not None or parts.path not in ("", "/"):
            return self.fail(f"{value!r} is no address of a server: write nats://HOST:PORT", param, ctx)
        return f"{parts.scheme}://{_bracketed(host)}:{port}"


@click.command()
@click.argument("name", type=NodeName())
@click.option(
    "--url",
    type=_Address(),
    help="How the node reaches the NATS server, as nats://HOST:PORT; several of a cluster with commas between them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def invite(name: str, url: str | None, as_json: bool) -> None:
    """Let a node connect, and print what its machine needs.

    The node has a user of its own and speaks for itself only. Inviting it again prints the same. On the
    node's machine `computemesh join` takes it:

    \b
      computemesh nodes invite gpu-7 > gpu-7.env        here
      computemesh join gpu-7.env                        there

    Any other program that is a node sets what is printed as its environment.
    """
    status = _here()
    address = url or _reached(status)
    made = _changed(admit_node(home().nats, home().credentials, name))
    values = exports(Where(url=with_login(address, made.login(Role.NODE, name)), role=Role.NODE, name=""))
    print_exports(values | {"COMPUTEMESH_NODE_ID": name}, as_json=as_json)
    err.print(f"\nNode {name} may connect. The above is all its machine needs, and holds its password. There:")
    err.print("  computemesh join FILE     with the above in that file, or - for standard input")
    if status is not None and not status.embedded:
        err.print(EXTERNAL_HINT)
    elif all(_is_local(urlsplit(server).hostname or "") for server in servers_of(address)):
        err.print("The NATS server listens on this machine only; `computemesh up --nats-host ADDRESS` changes that.")


@click.command()
@click.argument("name", type=NodeName())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def revoke(name: str, as_json: bool) -> None:
    """Take a node's leave to connect away, and close its connections."""
    status = _here()
    if status is not None and status.node_id == name:
        raise Failure(f"{name} is this machine's own node", hint="`computemesh down` stops it")
    if not _changed(expel_node(home().nats, home().credentials, name)):
        raise Failure(f"no node {name} was invited", hint=f"those that were: {', '.join(_invited()) or 'none'}")
    if as_json:
        print_json({"node_id": name, "invited": False})
    else:
        out.print(f"Node {name} may connect no more.")
    if status is not None and not status.embedded:
        err.print(EXTERNAL_HINT)


@click.command(name="nats-config")
@click.option(
    "--urls",
    "address",
    type=_Address(),
    help="Print instead what `computemesh up` needs to use the server there, as shell exports.",
)
@click.option("--node", "name", type=NodeName(), help="With --urls: the node that machine is.")
def nats_config(address: str | None, name: str | None) -> None:
    """Print the accounts and users that a NATS server of your own must have.

    Include it in the configuration of the server, or of each server of a cluster; JetStream must be
    enabled there. It holds passwords.
    """
    try:
        known = load_or_create(home().credentials)
    except BadCredentialsError as error:
        raise Failure(str(error)) from None
    if not address:
        click.echo(render_accounts(known), nl=False)
        return
    name = name or next(iter(known.nodes), "")
    if name not in known.nodes:
        raise Failure(f"no node {name} was invited" if name else "no node was invited yet", hint=_invite_hint(name))
    urls = {role: with_login(address, known.login(role, name if role is Role.NODE else "")) for role in Role}
    print_exports({f"COMPUTEMESH_NATS_URL_{role.value.upper()}": url for role, url in urls.items()}, as_json=False)


# --- addresses ---------------------------------------------------------------------------------------------------


def exports(where: Where) -> dict[str, str]:
    """What a program needs to use the bus."""
    return {"NATS_URL": where.url, "NATS_INBOX_PREFIX": where.inbox_prefix}


def print_exports(values: dict[str, str], *, as_json: bool) -> None:
    """Settings as shell exports, or as JSON."""
    if as_json:
        print_json(values)
        return
    for name, value in values.items():
        click.echo(f"export {name}={shlex.quote(value)}")


def node_url(status: MeshStatus, name: str) -> str:
    """The bus as an invited node reaches it from this machine."""
    known = load_or_create(home().credentials)
    if name not in known.nodes:
        raise Failure(f"no node {name} was invited", hint=_invite_hint(name))
    return with_login(status.nats_urls[Role.NODE.value], known.login(Role.NODE, name))


def not_a_node(role: str) -> NoReturn:
    raise Failure(f"--node goes with --role node, not with --role {role}")


def _here() -> MeshStatus | None:
    """The mesh that runs from this home, which must be one of its own."""
    status = read_status(home())
    if status is not None and status.joined:
        raise common.only_a_node("cannot say who else may connect")
    return status


def _reached(status: MeshStatus | None) -> str:
    """Where others reach the NATS server of this machine's mesh."""
    if status is None:
        raise common.no_mesh(f"no mesh runs in {home().root}, so name the server with --url")
    found = addresses(home().nats) if status.embedded else []
    if not found:
        return status.nats_urls[Role.NODE.value]
    host, port = min(found, key=lambda address: (_is_local(address[0]), ":" in address[0]))
    return f"nats://{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_local(host: str) -> bool:
    """Whether other machines cannot reach this address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_link_local


def _changed(change: Coroutine[Any, Any, T]) -> T:
    try:
        return common.run(change)
    except (BadCredentialsError, ServerError) as error:
        raise Failure(str(error)) from None


def _invited() -> list[str]:
    return sorted(load_or_create(home().credentials).nodes)


def _invite_hint(name: str) -> str:
    return f"`computemesh nodes invite {name or 'NAME'}` does that"
