"""The models of a node: fetched from a hub, a web server and a mirror, whole and checked or not at all.

Method: the store, the sources and ``huggingface_hub`` as they are, against a real HTTP server that speaks the hub's
interface (``hub.py``), and real files. What the agent says of it to the mesh is in ``test_node_models.py``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from huggingface_hub import constants, hf_hub_download

from computemesh.contracts.base import Refused
from computemesh.contracts.nodes import ModelFetch
from computemesh.modelsource import parse
from computemesh.testing.ggufs import a_gguf
from computemesh_services.node_agent.engines.orphans import Marks
from computemesh_services.node_agent.engines.place import EngineError
from computemesh_services.node_agent.engines.pool import EnginePool
from computemesh_services.node_agent.models import fetching, progress
from computemesh_services.node_agent.models.serving import options
from computemesh_services.node_agent.models.source import FetchError, Progress, SourceFile
from computemesh_services.node_agent.models.store import ModelStore, source_of
from tests.mesh.hub import COMMIT, Hub, running_hub

SMALL = a_gguf()
LARGE = a_gguf(tensors=[("w", (256, 2000), 12)])
"""288 KB: several pieces of a download."""

PARTS = {
    "Q8_0/m-Q8_0-00001-of-00002.gguf": a_gguf({"split.count": 2}, tensors=[("a", (256,), 12)]),
    "Q8_0/m-Q8_0-00002-of-00002.gguf": a_gguf({"split.count": 2}, tensors=[("b", (256,), 12)], seed=1),
}

# pyright: reportUnknownVariableType=false

Opened = Callable[..., ModelStore]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Hub, None, None]:
    """A hub with a tiny repository, and an empty cache for its library."""
    files = {"README.md": b"# tiny", "m-Q4_K_M.gguf": LARGE, "m-F32.gguf": SMALL, "broken-Q2_K.gguf": SMALL[:-40]}
    with running_hub(Hub(repos={"org/tiny-GGUF": files | PARTS})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        # The library reads HF_HOME when it is imported.
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon; the pauses themselves have a test of their own."""
    monkeypatch.setattr(progress, "PAUSE_S", 0.05)


@pytest_asyncio.fixture
async def opened(tmp_path: Path) -> AsyncGenerator[Opened]:
    """Opens stores in one folder, and closes them."""
    stores: list[ModelStore] = []

    def open_(*sources: str, **options: Any) -> ModelStore:
        store = ModelStore(tmp_path / "store", here={}, wanted=[parse(one) for one in sources], **options)
        stores.append(store)
        return store

    yield open_
    for store in stores:
        await store.close()


async def brought(store: ModelStore, name: str) -> Path:
    found = await asyncio.wait_for(store.obtain(name), 30)
    assert isinstance(found, Path), found
    return found


async def why_not(store: ModelStore, name: str) -> str:
    found = await asyncio.wait_for(store.obtain(name), 30)
    assert isinstance(found, Refused), found
    assert (found.code, found.status, found.retry) == ("unavailable", 503, "later")
    return found.reason


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def here(store: ModelStore, name: str) -> bool:
    return isinstance(store.path(name), Path)


def left(store: Path) -> list[str]:
    """All files below the store."""
    return sorted(path.name for path in store.rglob("*") if path.is_file())


# --- the hub -----------------------------------------------------------------------------------------------------


async def test_the_best_file_of_a_repository_is_fetched(hub: Hub, opened: Opened) -> None:
    """And its head is known at once."""
    store = opened("hf:org/tiny-GGUF")
    assert store.names() == ["tiny"]
    path = await brought(store, "tiny")
    assert path.name == "m-Q4_K_M.gguf"
    assert path.read_bytes() == LARGE
    head = store.head("tiny")
    assert head is not None
    assert head.context_tokens == 2048
    assert store.fetches() == []


async def test_a_quantisation_a_file_and_a_revision_can_be_named(hub: Hub, opened: Opened) -> None:
    store = opened("org/tiny-GGUF:f32", f"hf:org/tiny-GGUF/m-Q4_K_M.gguf@{COMMIT}")
    assert (await brought(store, "tiny")).name == "m-F32.gguf"
    assert (await brought(store, "m")).name == "m-Q4_K_M.gguf"
    assert any(one.path.endswith(f"/revision/{COMMIT}") for one in hub.seen)


async def test_all_parts_of_a_model_lie_side_by_side(hub: Hub, opened: Opened) -> None:
    """As engines want them: they are told the first one."""
    path = await brought(opened("hf:org/tiny-GGUF:Q8_0"), "tiny")
    assert [part.name for part in sorted(path.parent.glob("*.gguf"))] == [name[5:] for name in PARTS]
    assert path.name == "m-Q8_0-00001-of-00002.gguf"


async def test_what_was_fetched_is_there_in_the_next_life_without_a_word_to_the_hub(hub: Hub, opened: Opened) -> None:
    path = await brought(opened("hf:org/tiny-GGUF"), "tiny")
    asked = len(hub.seen)
    again = opened("hf:org/tiny-GGUF")
    assert again.path("tiny") == path
    await again.start()
    assert again.head("tiny") is not None
    assert len(hub.seen) == asked


async def test_a_file_that_changed_behind_the_back_of_the_store_is_fetched_again(hub: Hub, opened: Opened) -> None:
    """One that is cut short, or gone, is not served."""
    path = await brought(opened("hf:org/tiny-GGUF"), "tiny")
    with path.open("r+b") as file:
        file.truncate(1000)
    store = opened("hf:org/tiny-GGUF")
    assert isinstance(store.path("tiny"), Refused)
    assert (await brought(store, "tiny")).read_bytes() == LARGE


async def test_two_who_ask_at_once_fetch_once(hub: Hub, opened: Opened) -> None:
    """Whether one of them is the start of the node, another process, or neither."""
    hub.pause_s = 0.005
    store, other = opened("hf:org/tiny-GGUF"), opened("hf:org/tiny-GGUF")
    await store.start()
    await asyncio.gather(brought(store, "tiny"), brought(store, "tiny"))
    other.want("tiny")
    await until(lambda: here(other, "tiny"))
    assert len(hub.downloads()) == 1


async def test_a_download_that_broke_goes_on_where_it_was(hub: Hub, opened: Opened) -> None:
    """Also in the next life of the agent."""
    hub.break_after, hub.breaks = 100_000, 1
    first = opened("hf:org/tiny-GGUF")
    assert "broke off" in await why_not(first, "tiny")
    await first.close()
    assert await brought(opened("hf:org/tiny-GGUF"), "tiny")
    begins = [one.begin for one in hub.downloads()]
    assert begins[0] == 0
    assert 0 < begins[1] <= 100_000


async def test_a_download_that_breaks_over_and_over_comes_to_its_end(hub: Hub, opened: Opened) -> None:
    """As long as each try brings something, the next one comes soon."""
    hub.break_after, hub.breaks = 40_000, 5
    store = opened("hf:org/tiny-GGUF")
    await store.start()
    await until(lambda: here(store, "tiny"))
    begins = [one.begin for one in hub.downloads()]
    assert len(begins) == 6
    assert begins == sorted(set(begins)), "nothing is fetched twice"


async def test_a_server_that_always_begins_at_the_beginning_does_no_harm(hub: Hub, opened: Opened) -> None:
    """What it sends takes the place of what was there."""
    hub.break_after, hub.breaks, hub.ranges = 100_000, 1, False
    store = opened("hf:org/tiny-GGUF")
    await store.start()
    await until(lambda: here(store, "tiny"))
    assert (await brought(store, "tiny")).read_bytes() == LARGE
    assert len(hub.downloads()) == 2, "a wrong file would have been fetched once more"


async def test_while_it_is_fetched_requests_are_told_how_far_it_is(hub: Hub, opened: Opened) -> None:
    """And the mesh too."""
    hub.pause_s = 0.03
    store = opened("hf:org/tiny-GGUF")
    await store.start()
    await until(lambda: "%" in str(store.path("tiny")) and "(0 %)" not in str(store.path("tiny")))
    reason = str(store.path("tiny"))
    assert "'tiny' is being fetched: 0." in reason
    assert "of 0.3 MiB (" in reason
    (fetch,) = store.fetches()
    assert (fetch.model, fetch.total_mb, fetch.problem) == ("tiny", 1, "")
    assert 1 <= store.retry_after_s("tiny") <= 60


async def test_a_model_is_announced_when_it_is_here(hub: Hub, opened: Opened) -> None:
    """Told by the callback: at the beginning, and when all is done."""
    told: list[bool] = []
    store: ModelStore = opened("hf:org/tiny-GGUF", on_change=lambda: told.append(isinstance(store.path("tiny"), Path)))
    await brought(store, "tiny")
    await asyncio.sleep(0)
    assert told == [False, True]


async def test_a_model_may_wait_for_its_first_use(hub: Hub, opened: Opened) -> None:
    store = opened("hf:org/tiny-GGUF", fetch_at="first_use")
    await store.start()
    refusal = store.path("tiny")
    assert isinstance(refusal, Refused)
    assert "fetched from hf:org/tiny-GGUF when it is asked for" in refusal.reason
    assert (hub.seen, store.fetches()) == ([], [])
    assert await brought(store, "tiny")


async def test_a_model_that_nobody_named_is_unknown(opened: Opened) -> None:
    refusal = opened("hf:org/tiny-GGUF").path("other")
    assert isinstance(refusal, Refused)
    assert (refusal.code, refusal.status) == ("unknown_model", 404)
    assert "there is: tiny" in refusal.reason


# --- what can go wrong -------------------------------------------------------------------------------------------


async def test_a_repository_that_is_not_there_is_told(hub: Hub, opened: Opened) -> None:
    """The hub says 401 for those, as for private ones."""
    reason = await why_not(opened("hf:org/none"), "none")
    assert f"{hub.url} has no repository org/none, or not for us: a private one needs an HF_TOKEN" in reason


async def test_a_revision_a_file_or_a_quantisation_that_is_not_there_is_told(hub: Hub, opened: Opened) -> None:
    assert "no revision v9" in await why_not(opened("hf:org/tiny-GGUF@v9"), "tiny")
    assert "no file x.gguf in it; there is: Q8_0/" in await why_not(opened("hf:org/tiny-GGUF/x.gguf"), "x")
    assert "no file in it is Q6_K; there is: F32, Q2_K" in await why_not(opened("hf:org/tiny-GGUF:Q6_K"), "tiny")


async def test_a_gated_repository_needs_a_token_which_no_other_host_sees(
    hub: Hub, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of the hub come from elsewhere."""
    hub.gated, hub.token = {"org/tiny-GGUF"}, "hf_right"
    reason = await why_not(opened("hf:org/tiny-GGUF"), "tiny")
    assert f"ask for access at {hub.url}/org/tiny-GGUF, and set HF_TOKEN" in reason
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert await brought(opened("hf:org/tiny-GGUF"), "tiny")
    assert hub.downloads()
    assert all("authorization" not in one.headers for one in hub.downloads())


async def test_a_hub_that_is_down_is_tried_again(hub: Hub, opened: Opened) -> None:
    hub.down = 503
    store = opened("hf:org/tiny-GGUF")
    assert f"{hub.url} answers 503, and it is not in the cache of the hub; tried again in" in await why_not(
        store, "tiny"
    )
    patient = asyncio.create_task(store.obtain("tiny", patient=True))
    await until(lambda: len(hub.seen) > 3)
    assert not patient.done()
    hub.down = 0
    assert isinstance(await patient, Path)
    lasting = await opened("hf:org/none").obtain("none", patient=True)
    assert isinstance(lasting, Refused)


async def test_a_hub_that_nobody_answers_for_is_told(opened: Opened, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in await why_not(opened("hf:org/tiny-GGUF"), "tiny")


async def test_offline_the_cache_of_the_hub_serves(
    hub: Hub, opened: Opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What another program downloaded need not be downloaded again, and is linked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reason = await why_not(opened("hf:org/tiny-GGUF"), "tiny")
    assert "HF_HUB_OFFLINE is set, and it is not in the cache of the hub" in reason
    blobs = tmp_path / "hub" / "models--org--tiny-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / sha256(LARGE)).write_bytes(LARGE)
    snapshot = blobs.parent / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "m-Q4_K_M.gguf").symlink_to(blobs / sha256(LARGE))
    (blobs.parent / "refs").mkdir()
    (blobs.parent / "refs" / "main").write_text(COMMIT)
    path = await brought(opened("hf:org/tiny-GGUF"), "tiny")
    assert path.is_symlink()
    assert path.read_bytes() == LARGE
    assert hub.seen == []


async def test_what_the_librarys_cache_has_is_not_downloaded_again(hub: Hub, opened: Opened, tmp_path: Path) -> None:
    """As the library itself left it there; and if it is not what it should be, it is not used."""
    cached = Path(hf_hub_download("org/tiny-GGUF", "m-Q4_K_M.gguf", endpoint=hub.url, cache_dir=tmp_path / "hub"))
    before = len(hub.downloads())
    path = await brought(opened("hf:org/tiny-GGUF"), "tiny")
    assert path.is_symlink()
    assert len(hub.downloads()) == before
    cached.write_bytes(bytes(len(LARGE)))  # noqa: ASYNC240 - nobody else waits for this loop.
    shutil.rmtree(path.parent)
    path = await brought(opened("hf:org/tiny-GGUF"), "tiny")
    assert not path.is_symlink()
    assert path.read_bytes() == LARGE


async def test_a_file_with_another_checksum_is_deleted_and_both_sums_are_told(
    hub: Hub, opened: Opened, tmp_path: Path
) -> None:
    """A file that is not what the hub says it is never becomes a model."""
    hub.sums["m-Q4_K_M.gguf"] = "ab" * 32
    reason = await why_not(opened("hf:org/tiny-GGUF"), "tiny")
    assert f"m-Q4_K_M.gguf has the SHA-256 checksum {sha256(LARGE)}, not {'ab' * 32}" in reason
    assert [name for name in left(tmp_path / "store") if name.endswith(".gguf")] == []


async def test_another_checksum_than_the_operators_is_refused_before_a_byte_is_fetched(
    hub: Hub, opened: Opened
) -> None:
    reason = await why_not(opened(f"hf:org/tiny-GGUF#sha256={'cd' * 32}"), "tiny")
    assert sha256(LARGE) in reason
    assert "cd" * 32 in reason
    assert hub.downloads() == []
    assert await brought(opened(f"hf:org/tiny-GGUF#sha256={sha256(LARGE)}"), "tiny")


async def test_a_file_that_is_no_whole_model_is_refused(hub: Hub, opened: Opened, tmp_path: Path) -> None:
    """Even when its checksum is right."""
    reason = await why_not(opened("hf:org/tiny-GGUF:Q2_K"), "tiny")
    assert f"cut short: {len(SMALL) - 40} of {len(SMALL)} bytes" in reason
    assert [name for name in left(tmp_path / "store") if name.endswith(".gguf")] == []


async def test_a_store_that_is_full_refuses_with_the_numbers_and_removes_nothing(hub: Hub, opened: Opened) -> None:
    first = await brought(opened("hf:org/tiny-GGUF:F32"), "tiny")
    reason = await why_not(opened("hf:org/tiny-GGUF/m-Q4_K_M.gguf", bytes_max=len(LARGE)), "m")
    assert "the models here take 0.0 MiB of the 0.3 MiB they may take, so there is no room for 0.3 MiB" in reason
    assert first.exists()
    assert hub.downloads()[1:] == []
    assert await brought(opened("hf:org/tiny-GGUF/m-Q4_K_M.gguf", bytes_max=len(LARGE) + 10_000), "m")


async def test_a_disk_that_is_full_is_told_and_what_there_was_is_removed(
    hub: Hub, opened: Opened, tmp_path: Path
) -> None:
    """Half a model must not keep the rest of the machine from writing. The kernel refuses here as it would there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        reason = await why_not(opened("hf:org/tiny-GGUF"), "tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"no space left in {tmp_path / 'store'} for 0.3 MiB" in reason
    assert left(tmp_path / "store") == []


async def test_a_model_that_the_disk_has_no_room_for_is_refused_before_a_byte_is_fetched(
    hub: Hub, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RESERVE_BYTES", 2**60)
    reason = await why_not(opened("hf:org/tiny-GGUF"), "tiny")
    assert "GiB are free in" in reason
    assert "and 1073741824.0 GiB are needed" in reason
    assert hub.downloads() == []


def test_without_the_library_it_is_said_what_to_install(tmp_path: Path) -> None:
    """In a process that cannot see it."""
    program = (
        "import sys; sys.modules['huggingface_hub'] = None; import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'huggingface_hub' else find(name, *rest)\n"
        "from computemesh.modelsource import parse\n"
        "from computemesh_services.node_agent.models.store import source_of\n"
        "source_of(parse('hf:org/repo')).locate()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=os.environ)
    assert (
        "models of the Hugging Face Hub need the package huggingface_hub: pip install 'computemesh[hub]'" in done.stderr
    )


# --- web servers, mirrors and files ------------------------------------------------------------------------------


async def test_a_file_of_a_web_server_is_fetched_and_checked(hub: Hub, opened: Opened) -> None:
    """As any server has it that knows nothing of models; it goes on where it broke as well."""
    hub.break_after, hub.breaks = 100_000, 2  # The first answer is only looked at.
    url = f"{hub.url}/cdn/org/tiny-GGUF/m-Q4_K_M.gguf"
    store = opened(f"{url}#sha256={sha256(LARGE)}")
    await store.start()
    await until(lambda: here(store, "m"))
    assert (await brought(store, "m")).read_bytes() == LARGE
    assert hub.downloads()[-1].begin > 0
    wrong = opened(f"{url}#sha256={'ab' * 32}")
    assert f"has the SHA-256 checksum {sha256(LARGE)}, not {'ab' * 32}" in await why_not(wrong, "m")


async def test_what_a_web_server_does_not_have_is_told(hub: Hub, opened: Opened) -> None:
    reason = await why_not(opened(f"{hub.url}/x/m.gguf?key=secret#sha256={'ab' * 32}"), "m")
    assert f"{hub.url}/x/m.gguf: the server answers 404" in reason
    reason = await why_not(opened(f"http://127.0.0.1:1/m.gguf#sha256={'ab' * 32}"), "m")
    assert "http://127.0.0.1:1/m.gguf: " in reason
    assert "refused" in reason.lower()


async def test_what_a_longer_file_left_behind_is_begun_anew(hub: Hub, opened: Opened, tmp_path: Path) -> None:
    """A file that was replaced on the server is not joined to what was there of the other."""
    source = f"{hub.url}/cdn/org/tiny-GGUF/m-F32.gguf#sha256={sha256(SMALL)}"
    folder = fetching.folder_name("m", parse(source).location) + fetching.PARTIAL
    (tmp_path / "store" / folder).mkdir(parents=True)
    (tmp_path / "store" / folder / "m-F32.gguf").write_bytes(LARGE)
    assert (await brought(opened(source), "m")).read_bytes() == SMALL


async def test_a_mirror_is_copied_with_all_parts_and_their_checksums(opened: Opened, tmp_path: Path) -> None:
    """``sha256sum FILE > FILE.sha256`` beside a file is believed."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name, data in PARTS.items():
        (mirror / name[5:]).write_bytes(data)
        (mirror / f"{name[5:]}.sha256").write_text(f"{sha256(data)}  {name[5:]}\n")
    source = f"file://{mirror}/m-Q8_0-00001-of-00002.gguf"
    path = await brought(opened(source), "m")
    assert not path.is_symlink()
    shutil.rmtree(mirror)
    assert opened(source).path("m") == path
    assert path.read_bytes() == next(iter(PARTS.values()))


async def test_a_mirror_with_another_file_than_its_checksum_says_is_refused(opened: Opened, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(LARGE)
    (tmp_path / "m.gguf.sha256").write_text(sha256(SMALL))
    assert sha256(SMALL) in await why_not(opened(f"file://{tmp_path}/m.gguf"), "m")
    (tmp_path / "m.gguf.sha256").write_text("what?")
    assert "no SHA-256 checksum in it" in await why_not(opened(f"file://{tmp_path}/m.gguf"), "m")
    assert "no such file" in await why_not(opened(f"file://{tmp_path}/x.gguf"), "x")


async def test_a_file_of_this_machine_is_linked_and_checked_once(opened: Opened, tmp_path: Path) -> None:
    """And again when it has changed."""
    file = tmp_path / "m.gguf"
    file.write_bytes(LARGE)
    source = f"{file}#sha256={sha256(LARGE)}"
    path = await brought(opened(source), "m")
    assert path.is_symlink()
    assert opened(source).path("m") == path
    file.write_bytes(LARGE[:-1] + b"?")
    os.utime(file, ns=(1, 1))
    assert "checksum" in await why_not(opened(source), "m")
    assert file.exists(), "what is not the store's is never deleted"


class Peer:
    """A source of one's own: another node, say."""

    name = "peer:n1/m"

    def __init__(self, *names: str) -> None:
        self.names = names

    def locate(self) -> list[SourceFile]:
        return [SourceFile(name=name, size=len(SMALL)) for name in self.names]

    def fetch(self, file: SourceFile, into: Path, progress: Progress) -> Path:
        (into / file.name).write_bytes(SMALL)
        progress(len(SMALL))
        return into / file.name


def test_a_source_of_ones_own_is_held_to_the_same(tmp_path: Path) -> None:
    """A name that leads out of the store is refused, whoever tells it."""
    (path,) = fetching.fetch(Peer("m.gguf"), tmp_path / "store" / "m", lambda _done, _total: None)
    assert path.read_bytes() == SMALL
    for names in (("../m.gguf",), (".m.gguf",), ("/m.gguf",), ("m.txt",), ("m.gguf", "m.gguf"), ()):
        with pytest.raises(FetchError, match="peer:n1/m: "):
            fetching.fetch(Peer(*names), tmp_path / "store" / "x", lambda _done, _total: None)
    assert not (tmp_path / "store" / "x").exists()


# --- one fetch ---------------------------------------------------------------------------------------------------


def test_nobody_sees_half_a_model(hub: Hub, tmp_path: Path) -> None:
    """At every step of a fetch the model's folder is not there at all, or is whole."""
    folder = tmp_path / "store" / "m"
    steps: list[bool] = []

    def note(_done: int, _total: int) -> None:
        steps.append(folder.exists())

    found = fetching.fetch(source_of(parse("hf:org/tiny-GGUF:Q8_0")), folder, note)
    assert len(steps) > 3
    assert not any(steps)
    assert fetching.present(folder) == found
    assert left(tmp_path / "store") == ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "model.json"]


def test_while_one_process_fetches_another_does_not(hub: Hub, tmp_path: Path) -> None:
    """Nodes of one machine may share a store."""
    folder = tmp_path / "store" / "m"
    said: list[str] = []

    def note(done: int, _total: int) -> None:
        if done and not said:
            said.append("")
            with pytest.raises(FetchError) as caught:
                fetching.fetch(source_of(parse("hf:org/tiny-GGUF")), folder, lambda _done, _total: None)
            said.append(caught.value.reason)

    fetching.fetch(source_of(parse("hf:org/tiny-GGUF")), folder, note)
    assert said[1] == "another process of this machine is fetching it"
    assert len(hub.downloads()) == 1


async def test_a_node_that_ends_does_not_wait_for_a_download(hub: Hub, opened: Opened) -> None:
    """What there is of it stays."""
    hub.pause_s = 0.2
    store = opened("hf:org/tiny-GGUF")
    await store.start()
    await until(lambda: store.fetches() and hub.downloads())
    began = asyncio.get_running_loop().time()
    await store.close()
    assert asyncio.get_running_loop().time() - began < 5, "all of it takes 14 s"
    assert isinstance(store.path("tiny"), Refused)


def test_pauses_double_up_to_a_bound_and_lasting_trouble_is_tried_rarely() -> None:
    """A wrong checksum of 40 GB must not be downloaded every minute."""
    lasting = [progress.pause_s(n, lasting=True, chance=1.0) for n in (1, 2, 100)]
    assert lasting == [300.0, 600.0, 6 * 3600.0]
    assert progress.pause_s(100, lasting=False, chance=1.0) == 600.0
    assert progress.pause_s(3, lasting=False, chance=0.0) == progress.pause_s(3, lasting=False, chance=1.0) / 2


def test_progress_says_how_much_how_fast_and_how_long() -> None:
    """The rate is that of the last seconds, and a new beginning has none."""
    meter = progress.Meter()
    assert meter.said(0.0) == "it has just begun"
    for second in range(30):
        meter.note(second * 2**20 * (1 if second < 15 else 10), 600 * 2**20, float(second))
    assert meter.bytes_per_s(29.0) == pytest.approx(10 * 2**20, rel=0.5)
    assert meter.said(29.0).startswith("290.0 of 600.0 MiB (48 %), ")
    meter.note(0, 600 * 2**20, 30.0)
    assert meter.bytes_per_s(30.1) is None
    assert ModelFetch(model="m").total_mb is None


# --- requests ----------------------------------------------------------------------------------------------------


async def test_a_request_for_a_model_that_is_not_here_has_it_fetched_and_is_refused_until_it_is(
    hub: Hub, opened: Opened, tmp_path: Path
) -> None:
    """With 503, how far it is, and when to ask again."""
    store = opened("hf:org/tiny-GGUF", fetch_at="first_use")

    def missing(name: str) -> float:
        store.want(name)
        return store.retry_after_s(name)

    pool = EnginePool(
        options(store, {}, context_tokens=4096),
        log_dir=tmp_path,
        marks=Marks(tmp_path / "marks"),
        locate=lambda model: store.path(model.name),
        missing=missing,
    )
    assert [(card.name, card.present) for card in pool.model_cards()] == [("tiny", False)]
    assert hub.seen == [], "to tell of a model is no use of it"
    with pytest.raises(EngineError) as caught:
        async with pool.admit("tiny"):
            pass
    assert (caught.value.code, caught.value.status) == ("unavailable", 503)
    assert "'tiny' is not on this node yet" in caught.value.reason
    assert caught.value.retry_after_s is not None
    await until(lambda: here(store, "tiny"))
    pool.offer(options(store, {}, context_tokens=4096))
    (card,) = pool.model_cards()
    assert (card.present, card.context_tokens) == (True, 2048)
    await pool.close()
