"""``python -m computemesh_services.node_agent``, and ``rolemesh-node-agent``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from computemesh import __version__, log
from computemesh.bus import Bus
from computemesh.config import ConfigError, node_of, variables
from computemesh.contracts.services import NODE_AGENT
from computemesh.lifecycle import run
from computemesh.paths import home
from computemesh.process import EXIT_CONFIG
from computemesh_services.node_agent import config_file
from computemesh_services.node_agent.config import AgentConfig
from computemesh_services.node_agent.config_file import ConfigFile
from computemesh_services.node_agent.engines.backends.machine import devices_here
from computemesh_services.node_agent.engines.place import EngineError
from computemesh_services.node_agent.engines.server import launcher
from computemesh_services.node_agent.service import NodeAgent

SECRETS: Final = ("NATS_URL", "COMPUTEMESH_TOKEN", "ORCHESTRATOR_TOKEN", "_API_KEYS", "DISPATCHER_KEY")
"""Parts of the names of what is read once, then taken out of the environment: executors and engines inherit it
and have no use for it."""


_log = log.get("config")


def main() -> None:
    try:
        told = _told()
    except ConfigError as error:
        sys.stderr.write(f"{NODE_AGENT.name}: {error}\n")
        sys.exit(EXIT_CONFIG)

    def make(bus: Bus, config: AgentConfig, http_url: Callable[[], str]) -> NodeAgent:
        node_of(config.nats_url, config.node_id)
        for warning in told.warnings:
            _log.warning("configuration", reason=warning)
        for setting, variable in variables(AgentConfig).items():
            if setting in told.settings or (setting == config_file.MODELS and told.models is not None):
                _log.info("the environment counts before the file", setting=setting, variable=variable)
        for name in [name for name in os.environ if any(part in name for part in SECRETS)]:
            del os.environ[name]
        find = partial(devices_here, config.backend, cpu_plan=config.cpu_plan(), launcher=_launcher(config))
        return NodeAgent(bus, config, home(), http_url, told=told, find_devices=find)

    run(NODE_AGENT, AgentConfig, make, told=told.settings)


def _launcher(config: AgentConfig) -> list[str]:
    """The command that starts a llama.cpp server; empty when there is none, which the agent says by itself."""
    with contextlib.suppress(EngineError):
        return launcher(config.llama_server)
    return []


def _told() -> ConfigFile:
    """What the file says that the command line names, or else the environment.

    Raises:
        ConfigError: it cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog=NODE_AGENT.name, description="Serves inference and runs work on this machine, for a mesh."
    )
    parser.add_argument("--config", metavar="FILE", help="settings and models in YAML; the environment counts first")
    parser.add_argument("--version", action="version", version=__version__)
    path = parser.parse_args().config or os.environ.get(config_file.VARIABLE, "")
    return config_file.load(Path(path).expanduser()) if path else ConfigFile()


if __name__ == "__main__":
    main()
