"""Repositories of the Hugging Face Hub, through ``huggingface_hub``, which nothing else here imports.

The library says what is in a repository, who may have it, and what lies in its cache already (``HF_HOME``,
``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they mean there). The bytes come over :mod:`.web`: a
download that broke goes on in the next life of the agent too, where the library would begin again.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from computemesh_services.node_agent.models import checking
from computemesh_services.node_agent.models.choice import NoChoice, choose, file_and_parts
from computemesh_services.node_agent.models.source import FetchError, Progress, SourceFile
from computemesh_services.node_agent.models.web import Download

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

MISSING: Final = "models of the Hugging Face Hub need the package huggingface_hub"
LIST_S: Final = 30.0

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSource:
    """A model in a repository: :attr:`file`, or the best one of :attr:`quantisation`."""

    repo: str
    file: str
    quantisation: str
    revision: str
    name: str

    def locate(self) -> list[SourceFile]:
        api = _api()
        try:
            found = self._listed(api)
        except _Away as away:
            found = self._in_cache()
            if not found:
                raise FetchError(f"{self.name}: {away}, and it is not in the cache of the hub") from None
        try:
            names = file_and_parts(found, self.file) if self.file else choose(found, self.quantisation)
        except NoChoice as error:
            raise FetchError(f"{self.name}: {error}", lasting=True) from None
        return [found[name] for name in names]

    def fetch(self, file: SourceFile, into: Path, progress: Progress) -> Path:
        cached = self._cached(file, progress)
        if cached is not None:
            return cached
        from huggingface_hub import get_token

        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            return Download(file.location, headers).to(into / file.name, file.size, progress)
        except FetchError as error:
            if error.status in (401, 403):
                raise self._gated(_api().endpoint) from None
            raise

    def _listed(self, api: HfApi) -> dict[str, SourceFile]:
        """What the hub says is in the repository, by path.

        Raises:
            _Away: the hub cannot be reached.
            FetchError: it has no such repository, or not for us.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        hub = api.endpoint
        try:
            told = api.model_info(self.repo, revision=self.revision or None, files_metadata=True, timeout=LIST_S)
        except OfflineModeIsEnabled:
            raise _Away("HF_HUB_OFFLINE is set") from None
        except GatedRepoError:
            raise self._gated(hub) from None
        except RepositoryNotFoundError:
            raise self._none(hub) from None
        except RevisionNotFoundError:
            raise FetchError(f"{self.name}: {self.repo} has no revision {self.revision}", lasting=True) from None
        except HFValidationError as error:
            raise FetchError(f"{self.name}: {error}", lasting=True) from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403, 404):
                raise self._none(hub) from None
            raise _Away(f"{hub} answers {status}") from None
        except Exception as error:  # Whatever its HTTP library raises; which one that is changes.
            raise _Away(f"{hub} cannot be reached ({error or type(error).__name__})") from None
        commit = told.sha or self.revision or "main"
        return {
            file.rfilename: _source_file(file, hf_hub_url(self.repo, file.rfilename, revision=commit, endpoint=hub))
            for file in told.siblings or ()
            if file.rfilename.lower().endswith(".gguf") and file.size is not None
        }

    def _none(self, hub: str) -> FetchError:
        todo = "a private one needs an HF_TOKEN that may read it"
        return FetchError(f"{self.name}: {hub} has no repository {self.repo}, or not for us: {todo}", lasting=True)

    def _gated(self, hub: str) -> FetchError:
        todo = f"ask for access at {hub}/{self.repo}, and set HF_TOKEN to a token of yours"
        return FetchError(f"{self.name}: its owner decides who may have it; {todo}", lasting=True)

    def _in_cache(self) -> dict[str, SourceFile]:
        """What of the repository lies in the library's cache, by path."""
        folder = self._snapshot()
        found: dict[str, SourceFile] = {}
        for path in sorted(folder.rglob("*.gguf")) if folder else ():
            if path.is_file():
                sha256 = path.resolve().name
                found[path.relative_to(folder or path).as_posix()] = SourceFile(
                    name=path.name,
                    size=path.stat().st_size,
                    # Blobs of large files are named by their checksums.
                    sha256=sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else "",
                    location=str(path),
                )
        return found

    def _cached(self, file: SourceFile, progress: Progress) -> Path | None:
        """*file* in the library's cache, if it is there and is what it should be."""
        path = Path(file.location)
        if not path.is_absolute():
            if not file.sha256:
                return None
            path = _repo_folder(self.repo) / "blobs" / file.sha256
        try:
            if path.stat().st_size != file.size or (file.sha256 and checking.sha256_of(path, progress) != file.sha256):
                return None
        except OSError:
            return None
        return path

    def _snapshot(self) -> Path | None:
        folder = _repo_folder(self.repo)
        commit = self.revision
        if not _COMMIT.fullmatch(commit):
            try:
                commit = (folder / "refs" / (self.revision or "main")).read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError):
                return None
        snapshot = folder / "snapshots" / commit
        return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


class _Away(Exception):
    """The hub cannot be reached; its cache may do."""


def installed() -> bool:
    """Whether the library is there."""
    from importlib.util import find_spec

    return find_spec("huggingface_hub") is not None


def _api() -> HfApi:
    if not installed():
        raise FetchError(f"{MISSING}: pip install 'computemesh[hub]'", lasting=True)
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="computemesh")


def _repo_folder(repo: str) -> Path:
    """Where the library keeps what it downloaded of a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _source_file(file: RepoSibling, url: str) -> SourceFile:
    found = SourceFile(name=PurePosixPath(file.rfilename).name, size=file.size or 0, location=url)
    return replace(found, sha256=file.lfs.sha256.lower()) if file.lfs else found
