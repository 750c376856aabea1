"""What a node offers of the executors that are installed. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

COMMAND: Final = "command"
"""The work type that runs any program: it is offered only where an operator said so."""


def offers(
    installed: Collection[str], topics: Collection[str] | None, *, allow_commands: bool
) -> tuple[list[str], dict[str, str]]:
    """The work types to offer, sorted, and by each that is not, the reason.

    Args:
        topics: the only work types to offer; None for all.
    """
    kept_back: dict[str, str] = {}
    for work_type in sorted({*installed, *(topics or ())}):
        if topics is not None and work_type not in topics:
            kept_back[work_type] = "TASK_TOPICS does not name it"
        elif work_type not in installed:
            kept_back[work_type] = f"no executor of that name is installed; there is: {', '.join(sorted(installed))}"
        elif work_type == COMMAND and not allow_commands:
            kept_back[work_type] = "COMPUTEMESH_ALLOW_COMMANDS is not set"
    return sorted(set(installed) - kept_back.keys()), kept_back
