"""Files from web servers. A download that broke goes on where it was."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from computemesh_services.node_agent.models.source import FetchError, Progress, SourceFile

CHUNK_BYTES: Final = 1024 * 1024
CONNECT_S: Final = 10.0
SILENT_S: Final = 30.0
"""A server that sends nothing for so long has broken off."""
REDIRECTS_MAX: Final = 5

_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class WebSource:
    """The file at :attr:`url`. It is nobody's without its checksum, so plain ``http`` does as well."""

    url: str
    sha256: str
    name: str

    def locate(self) -> list[SourceFile]:
        with _opened(self.url, {}, 0) as answer:
            size = _length(answer)
        file_name = unquote(urlsplit(self.url).path.rpartition("/")[2])
        return [SourceFile(name=file_name, size=size, sha256=self.sha256, location=self.url)]

    def fetch(self, file: SourceFile, into: Path, progress: Progress) -> Path:
        return Download(file.location).to(into / file.name, file.size, progress)


@dataclass(frozen=True)
class Download:
    """What is at :attr:`url`, for whoever sends these headers. They are not sent on to another host."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    def to(self, target: Path, size: int, progress: Progress) -> Path:
        """Writes it to *target*, after what is there of it already.

        Raises:
            FetchError: it broke off, or is not of this *size* in bytes.
        """
        have = target.stat().st_size if target.exists() else 0
        if have > size:
            target.unlink()
            have = 0
        progress(have)
        if have == size:
            return target
        with _opened(self.url, self.headers, have) as answer, target.open("r+b" if have else "wb") as file:
            if answer.status == 416:
                target.unlink()
                raise FetchError(f"{_shown(self.url)}: the server does not go on from byte {have}")
            begins, whole = _begins(answer)
            if whole != size or begins not in (0, have):
                told = f"{whole} bytes from byte {begins}"
                raise FetchError(f"{_shown(self.url)}: the server has {told}, where {size} were announced")
            file.seek(begins)
            file.truncate()
            done = begins
            for chunk in _chunks(answer, self.url):
                done += len(chunk)
                if done > size:
                    raise FetchError(f"{_shown(self.url)}: the server sends more than the {size} bytes it announced")
                file.write(chunk)
                progress(done)
        if done < size:
            raise FetchError(f"{_shown(self.url)}: broke off after {done} of {size} bytes")
        return target


@contextlib.contextmanager
def _opened(url: str, headers: Mapping[str, str], begin: int) -> Generator[urllib3.BaseHTTPResponse, None, None]:
    """The answer to a request for what follows byte *begin*."""
    asked = {**headers, "Accept-Encoding": "identity"}
    if begin:
        asked["Range"] = f"bytes={begin}-"
    retries = urllib3.Retry(total=REDIRECTS_MAX, connect=0, read=0, status=0, other=0, redirect=REDIRECTS_MAX)
    with _pool(url) as pool:
        try:
            answer = pool.request("GET", url, headers=asked, preload_content=False, retries=retries)
        except urllib3.exceptions.HTTPError as error:
            raise FetchError(f"{_shown(url)}: {_cause(error)}") from error
        try:
            if answer.status not in ((200, 206, 416) if begin else (200,)):
                lasting = 400 <= answer.status < 500 and answer.status not in (408, 425, 429)
                said = f"{_shown(url)}: the server answers {answer.status} {answer.reason or ''}".rstrip()
                raise FetchError(said, lasting=lasting, status=answer.status)
            yield answer
        finally:
            answer.close()


def _chunks(answer: urllib3.BaseHTTPResponse, url: str) -> Generator[bytes, None, None]:
    try:
        while chunk := answer.read1(CHUNK_BYTES):
            yield chunk
    except urllib3.exceptions.HTTPError as error:
        raise FetchError(f"{_shown(url)}: broke off: {_cause(error)}") from error


def _begins(answer: urllib3.BaseHTTPResponse) -> tuple[int, int]:
    """The byte that an answer begins with, and how large all of the file is."""
    if answer.status == 200:
        return 0, _length(answer)
    told = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if told is None:
        raise FetchError("the server does not say which part of the file it sends")
    begin = int(told[1])
    return begin, int(told[2]) if told[2] != "*" else begin + _length(answer)


def _length(answer: urllib3.BaseHTTPResponse) -> int:
    told = answer.headers.get("Content-Length", "")
    if not told.isdecimal():
        raise FetchError("the server does not say how large the file is", lasting=True)
    return int(told)


def _pool(url: str) -> urllib3.PoolManager:
    """Connections, through the proxy that the environment names for *url*, if any."""
    timeout = urllib3.Timeout(connect=CONNECT_S, read=SILENT_S)
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        return urllib3.ProxyManager(proxy, timeout=timeout)
    return urllib3.PoolManager(timeout=timeout)


def _shown(url: str) -> str:
    """Without what may be a secret."""
    return url.partition("?")[0]


def _cause(error: urllib3.exceptions.HTTPError) -> str:
    """What went wrong beneath, without objects' addresses and the query of an address."""
    text = str(getattr(error, "reason", None) or (error.args or [error])[0])
    return re.sub(r"<[^>]*>:? ?|\?[^ )]*", "", text).strip() or type(error).__name__
