"""The examples do what their pages say: installed as a reader would, and run by their own tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Final

import httpx
import pytest

ROOT: Final = Path(__file__).parents[2]
EXAMPLES: Final = ROOT / "docs" / "examples"

WAIT_S: Final = 180.0


def test_the_executor_installs_from_its_own_package_and_passes_its_own_tests(tmp_path: Path) -> None:
    """pip builds and installs it, outside this tree; a real mesh finds it by its entry point and runs it."""
    source, target = tmp_path / "word-count", tmp_path / "installed"
    shutil.copytree(EXAMPLES / "executor", source, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--target", target, source], check=True, capture_output=True, timeout=WAIT_S)
    (source / "word_count.py").unlink()  # What is tested is what was installed.
    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", source],
        cwd=source,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(("name", "words"), [("nanoctrl/register.py", "ADDRESS"), ("peers/hosted.py", "PEER")])
def test_an_example_that_is_not_told_what_it_needs_says_what_that_is(name: str, words: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "COMPUTEMESH_PEER_SOCKET"}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert f"{Path(name).name} {words}" in done.stderr
    assert "Traceback" not in done.stderr


# --- a new subject --------------------------------------------------------------------------------------------

INSERTS: Final = re.compile(r"(?ms)^<!-- insert: (?P<path>\S+) -->\n```diff\n(?P<lines>.*?)^```$")


def insert(file: Path, lines: list[str]) -> None:
    """Puts the lines marked ``+`` behind the others, which must stand together once in *file*."""
    where = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if line.startswith("+"))
    text = file.read_text()
    assert text.count(where) == 1, f"{file}: {text.count(where)} times\n{where}"
    file.write_text(text.replace(where, where + new))


class Copy:
    """A copy of the tree, in which programs run with its modules and not with ours."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(
            ROOT, root, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist"), dirs_exist_ok=True
        )

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs ``python -m`` with these words."""
        path = os.pathsep.join(str(self.root / folder) for folder in ("shared", "services"))
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def ok(self, *command: str, **environment: str) -> str:
        """What a program prints that must go well."""
        done = self.run(*command, **environment)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def failures(self, *tests: str) -> set[str]:
        """The names of the tests that fail, of those in these files."""
        done = self.run("pytest", "-q", "-p", "no:cacheprovider", *tests)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return set(re.findall(r"(?m)^FAILED \S+::(\w+)", done.stdout))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """The tree with the files and lines of the page ``docs/contracts.md``, and nothing generated yet."""
    if (ROOT / "services" / "computemesh_services" / "greeter").exists():
        pytest.skip("somebody has done in this tree what the page says, so it cannot be done again")
    copy = Copy(tmp_path_factory.mktemp("tree"))
    shutil.copytree(EXAMPLES / "subject", copy.root, dirs_exist_ok=True)
    for found in INSERTS.finditer((ROOT / "docs" / "contracts.md").read_text()):
        insert(copy.root / found["path"], found["lines"].splitlines())
    copy.ok("ruff", "check", "--fix", "--exit-zero", ".")
    copy.ok("ruff", "format", ".")
    return copy


def test_a_new_subject_is_not_done_until_its_pages_and_examples_are_written(copy: Copy) -> None:
    """The tests name what is stale or missing, and are content after the two commands of the page."""
    subjects, payloads = (
        "test_the_reference_page_is_what_the_contracts_say",
        "test_every_payload_type_has_a_golden_file",
    )
    assert {subjects, f"{payloads}_and_every_file_a_type"} <= copy.failures("tests/contract/test_reference.py")
    copy.ok("computemesh.contracts.reference", "docs/reference")
    copy.ok("computemesh.testing.golden", "tests/contract/golden")
    assert copy.failures("tests/contract", "tests/docs/test_tables.py", "tests/docs/test_pages.py") == set()
    assert "`compute.greetings.greet.v1`" in (copy.root / "docs/reference/subjects.md").read_text()
    permissions = (copy.root / "docs/reference/permissions.md").read_text()
    assert permissions.count("`compute.greetings.greet.v1`") == 4, (
        "two roles may ask, one answers, an account imports it"
    )


def test_the_new_subject_passes_lint_and_both_type_checkers(copy: Copy) -> None:
    """Formatting, the rules of the architecture, mypy and pyright as in this tree."""
    for file in (EXAMPLES / "subject").rglob("*.py"):
        formatted = copy.root / file.relative_to(EXAMPLES / "subject")
        assert formatted.read_text() == file.read_text(), f"`make format` changes {file}"
    copy.ok("ruff", "check", ".")
    copy.ok("ruff", "format", "--check", ".")
    copy.ok("importlinter.cli", "lint", "--no-cache")
    changed = ("shared/computemesh", "services/computemesh_services/greeter", "tests/mesh/test_greeter.py")
    copy.ok("mypy", *changed)
    copy.ok("pyright", "--pythonpath", sys.executable, *changed)


def test_the_service_of_the_new_subject_passes_its_own_test_and_runs_under_up(copy: Copy, tmp_path: Path) -> None:
    """A process of the mesh like any other: ready, with its port, and answering."""
    copy.ok("pytest", "-q", "-p", "no:cacheprovider", "tests/mesh/test_greeter.py")
    cli = partial(copy.ok, "computemesh.cli", COMPUTEMESH_HOME=str(tmp_path), COMPUTEMESH_MODELS="/nowhere")
    try:
        cli("up", "--detach", "--no-demo", "--ports", "any", "--nats-port", "0")
        (greeter,) = [s for s in json.loads(cli("status", "--json"))["services"] if s["name"] == "greeter"]
        assert greeter["state"] == "ready"
        answer = httpx.get(f"{greeter['http']}/api/v1/greetings/Ada", params={"language": "de"})
        assert answer.json()["text"] == "Guten Tag, Ada!"
    finally:
        cli("down")
