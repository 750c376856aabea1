"""The examples do what their pages say: installed as a reader would, and run by their own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

EXAMPLES: Final = Path(__file__).parents[2] / "docs" / "examples"

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
