"""Settings of all tests."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from hypothesis import Phase, settings

# All tests, and every process they start, refuse fields that no contract declares; production ignores them.
# Read when the contracts are imported, which is before any test is.
os.environ.setdefault("COMPUTEMESH_STRICT", "true")

# How long an example takes says how busy the machine is.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")

# For .ci/mutants: the same examples each time, and that one fails is all there is to know.
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])

# A shell that starts the tests in the background has them ignore Ctrl-C, and so all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHORT = {"contract", "property", "unit"}
"""Folders of tests that take no time, or little."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes come first: when several run at once, the short ones fill what is left at the end."""
    items.sort(key=lambda item: not SHORT.isdisjoint(item.path.parts))
