"""Settings of all tests."""

from __future__ import annotations

import os
import signal
import threading

from hypothesis import Phase, settings

# All tests, and every process they start, refuse fields that no contract declares; production ignores them.
# Read when the contracts are imported, which is before any test is.
os.environ.setdefault("COMPUTEMESH_STRICT", "true")

# For .ci/mutants: the same examples each time, and that one fails is all there is to know.
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])

# A shell that starts the tests in the background has them ignore Ctrl-C, and so all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
