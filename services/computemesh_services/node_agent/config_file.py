"""The file of ``--config``: settings of the node-agent and the models it serves, in YAML. Pure, but for :func:`load`.

Keys are the settings of :class:`AgentConfig` by name, in the names of RoleMesh where those differ, and ``models``.
What the environment says of a setting counts before the file.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_type_hints

import msgspec

from computemesh import yamltext
from computemesh.config import ConfigError
from computemesh.contracts.base import Refused, refused
from computemesh.contracts.nodes import Name
from computemesh.models import Found
from computemesh.modelsource import SourceError
from computemesh.yamltext import Document, is_list, is_mapping
from computemesh_services.node_agent.config import AgentConfig
from computemesh_services.node_agent.engines.options import ModelOptions, why_refused
from computemesh_services.node_agent.models import serving

VARIABLE: Final = "COMPUTEMESH_CONFIG"
"""Names the file where ``--config`` does not."""

MODELS: Final = "models"

ROLEMESH: Final = {"listen_host": "http_host", "listen_port": "http_port"}
"""Settings by the names that RoleMesh's node agent has for them."""

NOT_HERE: Final = frozenset({MODELS, "ready_fd"})
"""Settings that are none of the file's: its models are more than paths."""

SEPARATORS: Final = {
    "labels": ",",
    "tags": ",",
    "topics": ",",
    "client_api_keys": ",",
    "node_api_keys": ",",
    "cpu_devices": " ",
}
"""Settings that are several things in one text: in the file they may be a list, ``labels`` a mapping."""

PATHS: Final = frozenset({"results_dir", "models_dir", "llama_server"})
"""Settings that are paths; those of the file start at its folder."""

SECRETS: Final = frozenset({"nats_url", "token", "client_api_keys", "node_api_keys", "dispatcher_key"})
"""Settings that others on the machine should not be able to read."""

EMBEDDING_ROLES: Final = frozenset({"embedding", "embeddings"})

Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Threads = Annotated[int, msgspec.Meta(ge=1, le=1024)]


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One of ``models``. What is left out is up to the node, or to llama.cpp."""

    model_id: Name
    """What requests call it."""
    path: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    """Its GGUF file, from the folder of this file."""
    source: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    """Where it is fetched from when it is not on the node."""
    sha256: Annotated[str, msgspec.Meta(pattern="^([0-9a-fA-F]{64})?$")] = ""
    """Of its file."""
    roles: Annotated[list[Name], msgspec.Meta(max_length=100)] = []
    """What it is there for, such as `chat`."""
    embeddings: bool | None = None
    """It gives embeddings, not texts; left out, when one of its roles says so."""
    ctx_size: Tokens | None = None
    """Longest prompt and answer of one request together, in tokens."""
    batch_size: Tokens | None = None
    ubatch_size: Tokens | None = None
    threads: Threads | None = None
    threads_batch: Threads | None = None
    gpu_layers: Annotated[int, msgspec.Meta(ge=-1, le=10_000)] | None = None
    main_gpu: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    tensor_split: list[Annotated[float, msgspec.Meta(ge=0)]] | str = []
    """Parts of the model on each GPU of a device, in proportion: a list, or a text such as `3,1`."""
    flash_attn: bool | Literal["on", "off", "auto"] | None = None
    alias: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """Another name that requests may use."""
    server_args: dict[Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9-]*$")], str | int | float | bool] = {}
    """Further arguments of llama-server by name, without dashes in front; not those of other keys, or of the agent."""

    def found(self, folder: Path) -> Found:
        """Where it is, or comes from.

        Args:
            folder: where relative paths start.

        Raises:
            SourceError: its source names none.
        """
        path = _from(folder, self.path) if self.path else None
        return serving.named(self.model_id, path=path, source=self.source, sha256=self.sha256)

    def options(self, folder: Path) -> ModelOptions:
        """How its server is started.

        Args:
            folder: where relative paths start.
        """
        return ModelOptions(
            name=self.model_id,
            path=_from(folder, self.path) if self.path else None,
            alias=self.alias,
            roles=tuple(self.roles),
            embeddings=bool(EMBEDDING_ROLES & set(self.roles)) if self.embeddings is None else self.embeddings,
            ctx_size=self.ctx_size,
            batch_size=self.batch_size,
            ubatch_size=self.ubatch_size,
            threads=self.threads,
            threads_batch=self.threads_batch,
            gpu_layers=self.gpu_layers,
            main_gpu=self.main_gpu,
            tensor_split=tuple(_split(self.tensor_split)),
            flash_attn=self.flash_attn if isinstance(self.flash_attn, str) else _FLASH[self.flash_attn],
            server_args=self.server_args,
        )


_FLASH: Final[dict[bool | None, Literal["on", "off"] | None]] = {True: "on", False: "off", None: None}
"""YAML reads ``on`` as true."""


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What the file says; without one, nothing."""

    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings by their names in :class:`AgentConfig`."""
    models: Sequence[ModelEntry] | None = None
    """None when the file names none."""
    folder: Path = Path()
    """Where its relative paths start."""
    warnings: Sequence[str] = ()

    def found(self) -> Found:
        """Where the models are, or come from.

        Raises:
            SourceError: a source names none. A file with such a source is refused when it is read.
        """
        return serving.joined(entry.found(self.folder) for entry in self.models or ())

    def model_options(self) -> list[ModelOptions]:
        return [entry.options(self.folder) for entry in self.models or ()]


def load(path: Path) -> ConfigFile:
    """Reads the file.

    Raises:
        ConfigError: it cannot be read, or says something that cannot be; with the file, the key and its place.
    """
    try:
        data = path.read_bytes()
        others_read = path.stat().st_mode & 0o077 != 0
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or 'unreadable').lower()}") from None
    found = parse(data, path.absolute().parent)
    if isinstance(found, Refused):
        raise ConfigError(f"{path}: {found.reason}")
    secret = sorted(SECRETS & found.settings.keys())
    if secret and others_read:
        found = replace(found, warnings=[f"{path} holds {', '.join(secret)}, and others may read it: chmod 600"])
    return found


def parse(data: bytes, folder: Path) -> ConfigFile | Refused:
    """What a file says, or why it cannot be used; the reason has the key, the line and the column."""
    document = yamltext.read(data)
    if isinstance(document, Refused):
        return document
    try:
        return _Reader(document, folder).read()
    except _Bad as bad:
        place = document.place(bad.path)
        said = f"{bad.path}: {bad.reason}" if bad.path else bad.reason
        code = "unknown_field" if bad.hint else "bad_config"
        reason = f"{said}{f' ({place})' if place else ''}{f'; {bad.hint}' if bad.hint else ''}"
        return Refused(code=code, field=bad.path, reason=reason)


class _Bad(Exception):
    def __init__(self, path: str, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason
        self.hint = hint


class _Reader:
    def __init__(self, document: Document, folder: Path) -> None:
        self._document = document
        self._folder = folder
        self._hints = get_type_hints(AgentConfig, include_extras=True)

    def read(self) -> ConfigFile:
        told = self._document.value
        if not is_mapping(told):
            raise _Bad("", "it is no mapping of settings, such as `node_id: render-01`")
        own = sorted({name for name in AgentConfig.__struct_fields__ if name not in NOT_HERE} | {MODELS, *ROLEMESH})
        _known(told, own, "")
        settings: dict[str, Any] = {}
        keys: dict[str, str] = {}
        for key, value in told.items():
            if key == MODELS:
                continue
            name = ROLEMESH.get(key, key)
            if name in keys:
                raise _Bad(key, f"{keys[name]} and {key} are one setting; keep one of them")
            keys[name] = key
            settings[name] = self._setting(key, name, value)
        return ConfigFile(
            settings=settings,
            models=self._models(told[MODELS]) if MODELS in told else None,
            folder=self._folder,
        )

    def _setting(self, key: str, name: str, value: Any) -> Any:
        if name in SEPARATORS:
            value = _joined(key, value, SEPARATORS[name])
        made = _converted(value, self._hints[name], key)
        # A bare word is a program on PATH.
        if name in PATHS and made and (name != "llama_server" or os.sep in made):
            return str(_from(self._folder, made))
        return made

    def _models(self, told: Any) -> list[ModelEntry]:
        if not is_list(told):
            raise _Bad(MODELS, "Expected a list of models, each with a model_id")
        entries: list[ModelEntry] = []
        names: dict[str, str] = {}
        for number, fields in enumerate(told):
            at = f"{MODELS}[{number}]"
            if not is_mapping(fields):
                raise _Bad(at, "Expected a model, such as `model_id: tiny` with a path")
            _known(fields, ModelEntry.__struct_fields__, at)
            arguments = fields.get("server_args")
            for name, value in arguments.items() if is_mapping(arguments) else ():
                if bad := why_refused(name, value):
                    raise _Bad(f"{at}.server_args.{name}", bad)
            entry: ModelEntry = _converted(fields, ModelEntry, at)
            if not entry.path and not entry.source:
                raise _Bad(at, f"{entry.model_id} has neither a path nor a source")
            try:
                _split(entry.tensor_split)
            except ValueError:
                raise _Bad(f"{at}.tensor_split", f"{entry.tensor_split!r} is no list of numbers") from None
            try:
                entry.found(self._folder)
            except SourceError as error:
                raise _Bad(f"{at}.source", str(error)) from None
            for key, name in (("model_id", entry.model_id), ("alias", entry.alias)):
                if name and name in names:
                    raise _Bad(f"{at}.{key}", f"'{name}' is already {names[name]}")
                names[name] = f"{at}.{key}"
            entries.append(entry)
        return entries


def _known(fields: Iterable[str], known: Sequence[str], path: str) -> None:
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise _Bad(f"{path}.{name}" if path else name, "unknown key", hint)


def _converted(value: Any, kind: Any, path: str) -> Any:
    """*value* as what *kind* is, without guessing: a text is no number."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except (ValueError, RecursionError) as error:
        told = refused(error, kind)
        inner = told.field.removeprefix("...")
        joint = "" if not inner or inner.startswith("[") else "."
        raise _Bad(f"{path}{joint}{inner}", told.reason) from None


def _joined(key: str, value: Any, separator: str) -> Any:
    """A list, or a mapping, as the one text that the setting is."""
    if is_mapping(value):
        parts = [f"{name}={_word(key, one)}" for name, one in value.items()]
    elif is_list(value):
        parts = [_word(f"{key}[{number}]", one) for number, one in enumerate(value)]
    elif isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    else:
        return value
    for part in parts:
        if separator in part:
            raise _Bad(key, f"{part!r} has a {separator!r} in it, which separates one from the next")
    return separator.join(parts)


def _word(path: str, value: Any) -> str:
    if isinstance(value, bool):  # What YAML makes of yes, no, on and off.
        raise _Bad(path, "Expected 'str', got 'bool'; put it in quotes")
    if not isinstance(value, str | int | float):
        raise _Bad(path, "Expected a word or a number")
    return str(value)


def _split(told: Sequence[float] | str) -> list[float]:
    """Raises ValueError: it is no list of numbers, none below 0."""
    parts = [float(part) for part in told.replace("/", ",").split(",")] if isinstance(told, str) else list(told)
    if not all(0 <= part < float("inf") for part in parts):
        raise ValueError(told)
    return parts


def _from(folder: Path, path: str) -> Path:
    return folder / Path(path).expanduser()
