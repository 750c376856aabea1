"""The models of a node: which are here, and how those that are not come here."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal, TypeVar

from computemesh import log as logs
from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import ModelFetch
from computemesh.gguf import Gguf, GgufError, read_all
from computemesh.models import parts
from computemesh.modelsource import ModelSource
from computemesh_services.node_agent.models import fetching, progress
from computemesh_services.node_agent.models.hub import HubSource
from computemesh_services.node_agent.models.local import LocalSource
from computemesh_services.node_agent.models.mirror import MirrorSource
from computemesh_services.node_agent.models.source import FetchError, Source, Stopped
from computemesh_services.node_agent.models.web import WebSource

T = TypeVar("T")
FetchAt = Literal["start", "first_use"]

AT_ONCE: Final = 2
"""Models that are fetched at the same time."""

TELL_S: Final = 10.0
"""How often the log says how far a fetch is."""

RETRY_S_MIN: Final = 1.0
RETRY_S_MAX: Final = 60.0
"""When those who ask for a model that is being fetched are told to ask again."""

_log = logs.get("models")


def source_of(wanted: ModelSource) -> Source:
    """What gives the files that *wanted* names."""
    match wanted.kind:
        case "hub":
            return HubSource(wanted.repo, wanted.file, wanted.quantisation, wanted.revision, wanted.location)
        case "web":
            return WebSource(wanted.location, wanted.sha256, wanted.location)
        case "mirror":
            assert wanted.path is not None
            return MirrorSource(wanted.path, wanted.location)
        case "path":
            assert wanted.path is not None
            return LocalSource(wanted.path, wanted.location)


class _Model:
    """A model that goes through the store."""

    def __init__(self, name: str, source: Source, sha256: str, folder: Path) -> None:
        self.name = name
        self.source = source
        self.sha256 = sha256
        self.folder = folder
        self.paths: list[Path] = []
        """Its files, once they are here."""
        self.meter = progress.Meter()
        self.problem = ""
        """Why it could not be fetched; empty while that is tried."""
        self.lasting = False
        """It will be the same until somebody changes something."""
        self.again_s = 0.0
        """When it is tried again, by the monotonic clock."""
        self.task: asyncio.Task[None] | None = None
        self.stopped = False
        self.moved = asyncio.Event()
        """Set when it is here, and when a try has failed."""

    def note(self, done: int, total: int) -> None:
        """Called by the thread that fetches."""
        if self.stopped:
            raise Stopped
        self.meter.note(done, total, time.monotonic())


class ModelStore:
    """Models on the disk of this node, and models that are fetched into a folder of its own.

    Everything but :meth:`start` and :meth:`close` is cheap: it asks neither the disk nor the network.

    Args:
        folder: where what is fetched is kept.
        here: models that are served where they are.
        wanted: models that are fetched, or checked, first.
        fetch_at: ``start`` fetches them in the background as soon as the node starts, ``first_use`` when the first
            asks for them.
        bytes_max: how much the folder may hold; 0 = any amount. Nothing is ever removed to make room.
        on_change: called in the event loop when a model is here, when a fetch begins, and when it fails.
    """

    def __init__(
        self,
        folder: Path,
        *,
        here: Mapping[str, Path],
        wanted: Iterable[ModelSource] = (),
        fetch_at: FetchAt = "start",
        bytes_max: int = 0,
        on_change: Callable[[], None] | None = None,
    ) -> None:
        self._here = dict(here)
        self._heads: dict[str, Gguf] = {}
        self._fetch_at: FetchAt = fetch_at
        self._bytes_max = bytes_max
        self._on_change = on_change
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._models: dict[str, _Model] = {}
        for one in wanted:
            home = folder / fetching.folder_name(one.model, one.location)
            model = self._models[one.model] = _Model(one.model, source_of(one), one.sha256, home)
            model.paths = fetching.present(home, one.sha256)

    def names(self) -> list[str]:
        """All models, those that are here and those that are to come."""
        return sorted({*self._here, *self._models})

    def path(self, name: str) -> Path | Refused:
        """The first file of a model, or why there is none yet. Begins nothing."""
        if name in self._here:
            return self._here[name]
        model = self._models.get(name)
        if model is None:
            there_is = ", ".join(self.names()) or "none"
            reason = f"no model '{name}' on this node; there is: {there_is}"
            return Refused(code="unknown_model", reason=reason, status=404, retry="elsewhere")
        if model.paths:
            return model.paths[0]
        return Refused(code="unavailable", reason=_why_absent(model), status=503, retry="later")

    def retry_after_s(self, name: str) -> float:
        """When it is worth asking again for a model that is not here."""
        model = self._models.get(name)
        if model is None or model.paths:
            return RETRY_S_MIN
        now_s = time.monotonic()
        left_s = model.again_s - now_s if model.problem else model.meter.left_s(now_s)
        return min(RETRY_S_MAX, max(RETRY_S_MIN, 5.0 if left_s is None else left_s))

    def head(self, name: str) -> Gguf | None:
        """What the head of a model's file says; None before it was read, and when it cannot be."""
        return self._heads.get(name)

    def fetches(self) -> list[ModelFetch]:
        """Models that are being fetched, or that will be tried again."""
        now_s = time.monotonic()
        found: list[ModelFetch] = []
        for model in self._models.values():
            if model.task is None or model.paths:
                continue
            rate = None if model.problem else model.meter.bytes_per_s(now_s)
            found.append(
                ModelFetch(
                    model=model.name,
                    done_mb=model.meter.done // 2**20,
                    total_mb=-(-model.meter.total // 2**20) or None,
                    mb_per_s=None if rate is None else round(rate / 2**20, 1),
                    problem=model.problem[:500],
                )
            )
        return found

    async def start(self) -> None:
        """Reads the heads of the models that are here, and begins to fetch the others unless that waits for a use."""
        here = self._here | {model.name: model.paths[0] for model in self._models.values() if model.paths}
        if here:
            self._heads = await asyncio.to_thread(_heads, here)
        if self._fetch_at == "start":
            for name in self._models:
                self.want(name)

    def want(self, name: str) -> None:
        """Begins to fetch a model, unless it is here or on its way."""
        model = self._models.get(name)
        if model is not None and not model.paths and model.task is None:
            model.task = asyncio.create_task(self._bring(model), name=f"fetch {name}")

    async def obtain(self, name: str, *, patient: bool = False) -> Path | Refused:
        """The first file of a model, as soon as it is here; or why it could not be fetched.

        Args:
            patient: waits through trouble that may pass.
        """
        self.want(name)
        model = self._models.get(name)
        while model is not None and not model.paths and (not model.problem or (patient and not model.lasting)):
            model.moved.clear()
            await model.moved.wait()
        return self.path(name)

    async def close(self) -> None:
        """Ends what is being fetched. What there is of it is gone on with in the next life of the agent."""
        tasks = [model.task for model in self._models.values() if model.task]
        for model in self._models.values():
            model.stopped = True
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _bring(self, model: _Model) -> None:
        """Tries until it is here."""
        failures = 0
        while not model.paths:
            before = model.meter.done
            try:
                async with self._turns:
                    model.problem = ""
                    self._changed()
                    await self._try(model)
            except FetchError as error:
                failures = 1 if model.meter.done > before else failures + 1
                pause_s = progress.pause_s(failures, lasting=error.lasting, chance=random.random())  # noqa: S311 - jitter.
                _log.warning("cannot fetch", model=model.name, reason=error.reason, again_in_s=round(pause_s, 1))
                model.problem, model.lasting = error.reason, error.lasting
                model.again_s = time.monotonic() + pause_s
                model.moved.set()
                self._changed()
                await asyncio.sleep(pause_s)
        model.moved.set()
        self._changed()

    async def _try(self, model: _Model) -> None:
        def fetch() -> tuple[list[Path], Gguf]:
            found = fetching.fetch(
                model.source, model.folder, model.note, sha256=model.sha256, bytes_max=self._bytes_max
            )
            return found, read_all(found)

        _log.info("fetching", model=model.name, source=model.source.name)
        began_s = time.monotonic()
        work = asyncio.ensure_future(_in_own_thread(fetch, f"fetch {model.name}"))
        try:
            while not (await asyncio.wait({work}, timeout=TELL_S))[0]:
                _log.info("fetching", model=model.name, progress=model.meter.said(time.monotonic()))
            model.paths, self._heads[model.name] = work.result()
        except (FetchError, asyncio.CancelledError):
            raise
        except Exception as error:
            _log.exception("a fetch ended by a defect", model=model.name)
            raise FetchError(f"a defect: {error}", lasting=True) from error
        finally:
            work.cancel()
        took_s = round(time.monotonic() - began_s, 1)
        _log.info("fetched", model=model.name, mb=model.meter.total // 2**20, took_s=took_s)

    def _changed(self) -> None:
        if self._on_change:
            self._on_change()


def _why_absent(model: _Model) -> str:
    now_s = time.monotonic()
    if model.problem:
        again_s = max(0.0, model.again_s - now_s)
        return f"'{model.name}' cannot be fetched: {model.problem}; tried again in {again_s:.0f} s"
    if model.task is None:
        return f"'{model.name}' is not on this node yet; it is fetched from {model.source.name} when it is asked for"
    return f"'{model.name}' is being fetched: {model.meter.said(now_s)}"


def _heads(models: Mapping[str, Path]) -> dict[str, Gguf]:
    found: dict[str, Gguf] = {}
    for name, path in models.items():
        try:
            found[name] = read_all(parts(path))
        except GgufError as error:
            _log.warning("model", reason=f"{path}: {error}")
    return found


async def _in_own_thread(work: Callable[[], T], name: str) -> T:
    """As ``asyncio.to_thread``, in a thread that the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # There is a result when there is no error.

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as raised:  # It is the waiter's.
            error = raised
        with contextlib.suppress(RuntimeError):  # The loop may have ended.
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done
