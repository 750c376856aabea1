"""What a mesh that the command line started says of itself."""

from __future__ import annotations

import json

from computemesh.contracts.base import Role
from computemesh.testing.cli import Cli


def pid_of(cli: Cli, name: str) -> int:
    status = json.loads((cli.home / "run" / "mesh.json").read_text())
    return next(int(service["pid"]) for service in status["services"] if service["name"] == name)


def url_of(cli: Cli, role: Role) -> str:
    return str(json.loads((cli.home / "run" / "mesh.json").read_text())["nats_urls"][role.value])


def examined(cli: Cli, **changes: str) -> dict[tuple[str, str], dict[str, str]]:
    """The doctor's findings by level and what they are about."""
    done = cli.run("doctor", "--json", **changes)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    return {(finding["level"], finding["about"]): finding for finding in report["findings"]}
