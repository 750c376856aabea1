"""All tests, and every process they start, refuse fields that no contract declares. Production ignores them."""

from __future__ import annotations

import os

os.environ.setdefault("COMPUTEMESH_STRICT", "true")  # Read when the contracts are imported: before any test is.
