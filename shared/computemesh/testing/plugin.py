"""An executor for one test, installed the way any plug-in is."""

from __future__ import annotations

import os
from pathlib import Path


def install_executor(folder: Path, work_type: str, source: str) -> dict[str, str]:
    """Makes a plug-in in *folder*, and gives the environment variables with which it is found.

    Args:
        source: a module with the class ``Plugin``, which runs work of type *work_type*.
    """
    info = folder / f"{work_type}_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{work_type}_plugin.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {work_type}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[computemesh.executors]\n{work_type} = {work_type}_plugin:Plugin\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
