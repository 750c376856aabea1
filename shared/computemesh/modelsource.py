"""Where a model comes from, as people write it.

    ~/models, /models/a.gguf                    files and folders of this machine, served where they are
    hf:org/repo[/FILE.gguf][:QUANT][@REVISION]  the Hugging Face Hub; without a file the best one is chosen
    org/repo[:QUANT][@REVISION]                 the same, unless there is a file or folder of that name here
    file:///mnt/mirror/a.gguf                   a mirror on a share: copied
    https://host/a.gguf#sha256=…                any web server; the checksum is demanded

A model's name is its file's, or its repository's, without the quantisation: ``SmolLM2-135M-Instruct.Q4_1.gguf`` is
``smollm2-135m-instruct``. ``#sha256=…`` may follow each, and ``#name=…`` (or ``#name=…&sha256=…``), the name that the
model is served under.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

PART: Final = re.compile(r"-(\d{5})-of-(\d{5})$")
"""How the name of a file ends, without ``.gguf``, that is one of several."""

_QUANTISATION: Final = re.compile(
    r"(?:[.\-_](?:i1|imat|UD))?[.\-_](?:I?Q\d(?:_[A-Z0-9]{1,3}){0,3}|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|B?F16|F32|FP(?:8|16|32))$",
    re.IGNORECASE,
)
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_FRAGMENT: Final = re.compile(r"#((?:sha256|name)=[^#]*)$")
_REPO: Final = r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
_CHOICE: Final = r"(?::(?P<quantisation>[A-Za-z0-9][\w-]{0,31}))?(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,199}))?"
_HUB: Final = re.compile(rf"(?:hf:(?://)?|(?:https://)?(?:hf\.co|huggingface\.co)/){_REPO}(?P<file>/[^:@#]+)?{_CHOICE}")
_HUB_PAGE: Final = re.compile(
    rf"https://(?:hf\.co|huggingface\.co)/{_REPO}/(?:blob|resolve)/(?P<revision>[^/]+)(?P<file>/[^:@#?]+)(?:\?.*)?"
)
_BARE: Final = re.compile(rf"{_REPO}{_CHOICE}")
_HUB_FORM: Final = "write hf:org/repo, hf:org/repo:QUANT or hf:org/repo/FILE.gguf, and @REVISION after it if need be"


def model_name(file_name: str) -> str:
    """The name a model file is served under."""
    stem = re.sub(r"\.gguf$", "", file_name, flags=re.IGNORECASE)
    whole = PART.sub("", stem)
    return (_QUANTISATION.sub("", whole) or whole).lower()


class SourceError(Exception):
    """This names no source of a model; the message says what to write instead."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model comes from."""

    kind: Literal["path", "hub", "mirror", "web"]
    location: str
    """The source in its usual form, without what follows ``#``. Two that are equal are the same source."""
    name: str = ""
    """The name that the model is served under; left out, it follows from the file or the repository."""
    sha256: str = ""
    """Of its file, in lower case; left out, any file will do that the source itself vouches for."""
    path: Path | None = None
    """Of a ``path`` or a ``mirror``."""
    repo: str = ""
    """Of the ``hub``, such as ``org/repo``."""
    file: str = ""
    """In the repository; left out, one is chosen."""
    quantisation: str = ""
    """Of the file to choose, such as ``Q4_K_M``; left out, the best."""
    revision: str = ""
    """A branch, a tag or a commit of the repository; left out, its main branch."""

    @property
    def model(self) -> str:
        """The name that the model is served under."""
        if self.name:
            return self.name
        if self.kind == "hub" and not self.file:
            return model_name(re.sub(r"[-_.]gguf$", "", self.repo.partition("/")[2], flags=re.IGNORECASE))
        return model_name(self._file_name)

    @property
    def fetched(self) -> bool:
        """It goes through the node's store of models; others are found on the disk, and served where they are."""
        return self.kind != "path" or bool(self.sha256 or self.name)

    @property
    def _file_name(self) -> str:
        path = unquote(urlsplit(self.location).path) if self.kind == "web" else self.file
        return self.path.name if self.path else path.rpartition("/")[2]


def parse(text: str, *, exists: Callable[[str], bool] = os.path.exists) -> ModelSource:
    """The source that *text* names.

    Args:
        exists: whether there is a file or folder of that name here.

    Raises:
        SourceError: it names none, or might name two.
    """
    text = text.strip()
    told = _FRAGMENT.search(text)
    bare = text[: told.start()] if told else text
    if not bare:
        raise SourceError("the source of a model is empty")
    wish = _wish(told[1]) if told else {}
    source = replace(_located(bare, exists), name=wish.get("name", ""), sha256=wish.get("sha256", ""))
    if source.kind == "web" and not source.sha256:
        raise SourceError(f"{bare}: a file from a web server needs its checksum: add #sha256=…")
    return source


def parse_all(config: str) -> tuple[list[ModelSource], list[str]]:
    """The sources in *config*, separated by commas, and a sentence for each part that names none."""
    found: list[ModelSource] = []
    wrong: list[str] = []
    for part in config.split(","):
        if part.strip():
            try:
                found.append(parse(part))
            except SourceError as error:
                wrong.append(str(error))
    return found, wrong


def fragment(text: str) -> str:
    """What follows the source in *text*, from ``#`` on."""
    told = _FRAGMENT.search(text.strip())
    return told[0] if told else ""


def checksum(text: str) -> str:
    """A SHA-256 checksum in lower case.

    Raises:
        SourceError: it is none.
    """
    if not _SHA256.fullmatch(text):
        raise SourceError(f"{text!r} is no SHA-256 checksum: 64 digits from 0 to 9 and a to f")
    return text.lower()


def _wish(fragment: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in fragment.split("&"):
        key, _, value = part.partition("=")
        if key not in ("sha256", "name") or not value or key in found:
            raise SourceError(f"#{fragment}: write #sha256=…, #name=… or #name=…&sha256=…")
        found[key] = checksum(value) if key == "sha256" else unquote(value)
    return found


def _located(text: str, exists: Callable[[str], bool]) -> ModelSource:
    if hub := _HUB_PAGE.fullmatch(text) or _HUB.fullmatch(text):
        return _hub(hub, text)
    scheme = text.partition(":")[0].lower() if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) else ""
    match scheme:
        case "hf":
            raise SourceError(f"{text}: not a repository of the hub; {_HUB_FORM}")
        case "file":
            return _mirror(text)
        case "http" | "https":
            return _web(text)
        case _:
            pass
    bare = _BARE.fullmatch(text)
    if bare and not text.lower().endswith(".gguf"):
        if not exists(text):
            return _hub(bare, text)
        raise SourceError(f"{text} is here, and could be on the hub as well: write ./{text} or hf:{text}")
    if scheme and not exists(text):
        raise SourceError(f"{text}: models come from paths, hf:, file: and https:, not from {scheme}:")
    path = Path(os.path.expanduser(text))  # noqa: PTH111 - which raises nothing for `~nobody`.
    return ModelSource(kind="path", location=str(path), path=path)


def _hub(found: re.Match[str], text: str) -> ModelSource:
    parts = found.groupdict()
    file = unquote(parts.get("file") or "").lstrip("/")
    quantisation = parts.get("quantisation") or ""
    if file and not file.lower().endswith(".gguf"):
        raise SourceError(f"{text}: {file} is no GGUF file; {_HUB_FORM}")
    if file and quantisation:
        raise SourceError(f"{text}: the file says which quantisation it is; leave out :{quantisation}")
    if ".." in file.split("/"):
        raise SourceError(f"{text}: .. in the name of a file")
    revision = parts.get("revision") or ""
    location = "".join(
        (
            f"hf:{parts['repo']}",
            file and f"/{file}",
            quantisation and f":{quantisation.upper()}",
            revision and f"@{revision}",
        )
    )
    return ModelSource(
        kind="hub",
        location=location,
        repo=parts["repo"],
        file=file,
        quantisation=quantisation.upper(),
        revision=revision,
    )


def _mirror(text: str) -> ModelSource:
    url = urlsplit(text)
    path = unquote(url.path)
    if url.netloc not in ("", "localhost") or not path.startswith("/") or url.query or url.fragment:
        raise SourceError(f"{text}: write file:///absolute/path.gguf; a share has to be mounted")
    if not path.lower().endswith(".gguf"):
        raise SourceError(f"{text}: name one GGUF file; a folder of them is named as a path, and served where it is")
    return ModelSource(kind="mirror", location=f"file://{path}", path=Path(path))


def _web(text: str) -> ModelSource:
    url = urlsplit(text)
    if not url.hostname or url.fragment or not url.path.lower().endswith(".gguf"):
        raise SourceError(f"{text}: write https://host/path/FILE.gguf#sha256=…")
    if url.username or url.password:
        raise SourceError(f"a password in https://{url.hostname}…: it would be told to everyone who asks")
    return ModelSource(kind="web", location=url._replace(scheme=url.scheme.lower()).geturl())
