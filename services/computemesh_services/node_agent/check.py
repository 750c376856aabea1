"""What the node agent needs of this machine: models and an engine. Prints findings for ``computemesh doctor``."""

from __future__ import annotations

import importlib
import os
import sys

from computemesh import findings
from computemesh.findings import Finding
from computemesh.models import Found, find_models
from computemesh_services.node_agent.engines.place import EngineError
from computemesh_services.node_agent.engines.server import launcher
from computemesh_services.node_agent.models import hub


def models(found: Found) -> list[Finding]:
    """Whether there is something to serve, or to fetch."""
    said = [
        findings.warning("models", text, "correct COMPUTEMESH_MODELS or `computemesh up --models`")
        for text in found.warnings
    ]
    if any(source.kind == "hub" for source in found.wanted) and not hub.installed():
        said.append(findings.warning("models", hub.MISSING, "pip install 'computemesh[hub]'"))
    if found.names:
        return [*said, findings.ok("models", ", ".join(found.names))]
    todo = "name GGUF files, folders or hf:org/repo with `computemesh up --models SOURCES`"
    return [*said, findings.warning("models", "this machine has no model to serve", todo)]


def engine() -> Finding:
    """Whether there is something to serve it with, and it loads."""
    todo = "pip install 'computemesh[llama]', or put llama-server on PATH"
    try:
        command = launcher(os.environ.get("COMPUTEMESH_LLAMA_SERVER", ""))
    except EngineError as error:
        return findings.warning("engine", error.reason, todo)
    if len(command) == 1:
        return findings.ok("engine", command[0])
    try:
        importlib.import_module("xllamacpp")
    except (ImportError, OSError) as error:  # A library that it is linked with may be missing.
        return findings.problem("engine", f"xllamacpp is installed and does not load: {error}", todo)
    return findings.ok("engine", "llama.cpp in the xllamacpp package")


def main() -> None:
    found = [*models(find_models(os.environ.get("COMPUTEMESH_MODELS"))), engine()]
    sys.stdout.buffer.write(findings.encode(found))


if __name__ == "__main__":
    main()
