"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import Phase, settings

# All tests, and every process they start, refuse fields that no contract declares; production ignores them.
# Read when the contracts are imported, which is before any test is.
os.environ.setdefault("COMPUTEMESH_STRICT", "true")

# For .ci/mutants: the same examples each time, and that one fails is all there is to know.
settings.register_profile("mutants", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
