"""What a node offers: what is installed, within what its operator said."""

from __future__ import annotations

from computemesh_services.node_agent.offers import offers

INSTALLED = ("ppo", "command", "inference")


def test_everything_installed_is_offered_but_commands() -> None:
    """Those only where an operator allowed them."""
    offered, kept_back = offers(INSTALLED, None, allow_commands=False)
    assert (offered, kept_back) == (["inference", "ppo"], {"command": "COMPUTEMESH_ALLOW_COMMANDS is not set"})
    assert offers(INSTALLED, None, allow_commands=True) == (["command", "inference", "ppo"], {})


def test_topics_restrict_what_is_offered_and_add_nothing() -> None:
    """A topic allows no commands; one without an executor is said to have none."""
    offered, kept_back = offers(INSTALLED, {"command", "inference", "paint"}, allow_commands=False)
    assert offered == ["inference"]
    assert kept_back == {
        "command": "COMPUTEMESH_ALLOW_COMMANDS is not set",
        "paint": "no executor of that name is installed; there is: command, inference, ppo",
        "ppo": "TASK_TOPICS does not name it",
    }
