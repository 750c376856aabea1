"""Configuration: frozen structs, filled from the environment, explained when wrong.

The field ``http_port`` is read from ``COMPUTEMESH_HTTP_PORT``. A field may have further names, for people
who come from other systems: ``Annotated[int, Meta(extra={"env": ["WORK_RETRY_MAX"]})]``. The first name
that is set wins.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from computemesh.addresses import login_of
from computemesh.contracts.base import Role
from computemesh.contracts.permissions import identity
from computemesh.log import LogFormat

C = TypeVar("C", bound=msgspec.Struct)

PREFIX = "COMPUTEMESH_"

NODE_ID_NAMES: Final = ("COMPUTEMESH_NODE_ID", "WORKER_ID")
"""Variables that name the node a machine is; the first that is set wins."""

Seconds = Annotated[float, msgspec.Meta(gt=0, le=366 * 86_400)]
"""A time that a setting may be: above 0, at most a year, so that neither infinity nor a slip passes."""


class ConfigError(Exception):
    """A setting that cannot be used; the message names the variable, its value and what is expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entrance:
    """Who may call an HTTP edge."""

    tokens: tuple[str, ...] = ()
    """Bearer tokens, any of which will do."""
    loopback_is_open: bool = True
    """Whether callers need none of them where the edge is bound to loopback."""
    apart: tuple[str, ...] = ()
    """What paths begin with that are none of the edge's business: their handlers ask who calls."""
    keys: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict[str, tuple[str, ...]])
    """Keys by what the paths begin with for which they are demanded, on loopback too; the longest beginning counts. The
    tokens open these paths as well."""
    missing: str = "send Authorization: Bearer <COMPUTEMESH_TOKEN>"
    wrong: str = "that token is not the one of this mesh"
    """What callers are told who show none, or another one."""


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every service can be told."""

    nats_url: Annotated[str, msgspec.Meta(extra={"env": ["NATS_URL"]})] = "nats://127.0.0.1:4222"
    """Where the bus is, with the credentials of this process's role in it; several servers of one cluster are
    separated by commas."""
    http_host: str = "127.0.0.1"
    """Address the HTTP edge binds. Beyond loopback a token is demanded."""
    http_port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    """Port of the HTTP edge; 0 = any free one."""
    token: str = ""
    """Bearer token that HTTP callers must show when the edge is bound beyond loopback."""
    allow_open: bool = False
    """Allow an edge beyond loopback without a token: only inside a network that is closed itself."""
    log_level: Annotated[
        str, msgspec.Meta(pattern="^(?i:debug|info|warn|warning|error|critical)$", extra={"env": ["LOG_LEVEL"]})
    ] = "info"
    log_format: LogFormat = "auto"
    instance: str = ""
    """Name of this replica, the same in its next life; left out, one is made up."""
    drain_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 20.0
    """How long a service that was told to end may finish what it has in hand."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    """Copies of each stream and bucket in a JetStream cluster. Those that have more keep them."""
    ready_fd: int | None = None
    """Descriptor to which one line is written once the service is ready. Set by the supervisor."""

    def answering_s(self) -> float:
        """How long HTTP requests in hand may go on when the service was told to end. Those that are cut off then have a
        moment to say so."""
        return 0.9 * self.drain_timeout_s

    def entrance(self) -> Entrance:
        """Who may call the HTTP edge."""
        return Entrance(tokens=(self.token,) if self.token else ())


def nats_url(role: Role, environ: Mapping[str, str] | None = None) -> str:
    """The bus as *role* reaches it: ``COMPUTEMESH_NATS_URL_<ROLE>``, else ``NATS_URL``; empty when neither is set."""
    values = os.environ if environ is None else environ
    return values.get(_url_name(role), "") or values.get("NATS_URL", "")


def nats_urls(environ: Mapping[str, str] | None = None) -> dict[Role, str]:
    """The bus as each role reaches it; empty when the environment names none.

    Raises:
        ConfigError: it names one for some roles only.
    """
    urls = {role: nats_url(role, environ) for role in Role}
    if not any(urls.values()):
        return {}
    for role, url in urls.items():
        if not url:
            raise ConfigError(f"{_url_name(role)} is not set, and NATS_URL neither; each role needs an address")
    return urls


def told_node_id(environ: Mapping[str, str] | None = None) -> str:
    """The node that the environment says this machine is; empty when it says none."""
    values = os.environ if environ is None else environ
    return next((values[name] for name in NODE_ID_NAMES if values.get(name)), "")


def node_of(url: str, named: str) -> str:
    """The node that a process is: the one whose user is in the bus's address, else the one it was told.

    Raises:
        ConfigError: these are two.
    """
    who = identity(login_of(url).partition(":")[0])
    mine = who.node_id if who else ""
    if mine and named and mine != named:
        raise ConfigError(
            f"COMPUTEMESH_NODE_ID is {named}, but the address of the bus has the user of {mine}; "
            "each node has a user of its own: `computemesh nodes invite NAME` makes one"
        )
    return mine or named


def _url_name(role: Role) -> str:
    return f"{PREFIX}NATS_URL_{role.value.upper()}"


def load(kind: type[C], environ: Mapping[str, str] | None = None, told: Mapping[str, Any] | None = None) -> C:
    """A configuration of type *kind* from environment variables.

    Args:
        told: fields, by name, of which a file says what they are where the environment does not.

    Raises:
        ConfigError: a value does not fit, or one without a default is not set.
    """
    values = os.environ if environ is None else environ
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, Any] = dict(told or {})
    names = variables(kind, values)
    for field in msgspec.structs.fields(kind):
        if (name := names.get(field.name)) is not None:
            found[field.name] = _value(values[name], hints[field.name], name)
        elif field.required and field.name not in found:
            raise ConfigError(f"{PREFIX}{field.name.upper()} is not set, and has no default")
    return kind(**found)


def variables(kind: type[msgspec.Struct], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variable that says what a field of *kind* is, by the field's name, for those of which the environment says
    it."""
    values = os.environ if environ is None else environ
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, str] = {}
    for field in kind.__struct_fields__:
        names = [PREFIX + field.upper(), *_other_names(hints[field])]
        name = next((name for name in names if values.get(name, "") != ""), None)
        if name is not None:
            found[field] = name
    return found


def _other_names(hint: Any) -> list[str]:
    if get_origin(hint) is not Annotated:
        return []
    metas = [meta for meta in get_args(hint)[1:] if isinstance(meta, msgspec.Meta)]
    return [name for meta in metas for name in (meta.extra or {}).get("env", [])]


def _value(text: str, hint: Any, name: str) -> Any:
    try:
        return msgspec.convert(text, hint, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}={text!r}: {error}") from None
