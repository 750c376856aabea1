"""What was promised about messages, kept: the reference pages are fresh, and old payloads still decode.

``golden/`` has one example of every payload as it was first shipped. These files are never edited: within v1
a message may only gain fields with defaults. A new payload type gets its file from
``python -m computemesh.testing.golden tests/contract/golden``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from computemesh.cli import reference as cli_reference
from computemesh.cli.common import is_list, is_mapping
from computemesh.contracts import reference
from computemesh.contracts.base import Refused, decode, encode
from computemesh.testing.golden import file_name, payload_types

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", reference.pages())
def test_the_reference_page_is_what_the_contracts_say(name: str) -> None:
    """Stale pages are renewed with ``make docs``."""
    assert (ROOT / "docs" / "reference" / name).read_text() == reference.pages()[name]


def test_there_is_a_reference_page_for_each_file_and_a_file_for_each_page() -> None:
    """A service that is gone leaves no document behind."""
    folder = ROOT / "docs" / "reference"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == reference.pages().keys()


def test_the_page_about_the_command_line_is_what_the_commands_say() -> None:
    """A stale page is renewed with ``make docs``."""
    assert (ROOT / "docs" / "cli.md").read_text() == cli_reference.page()


def test_every_payload_type_has_a_golden_file_and_every_file_a_type() -> None:
    """A new message is recorded, a removed one is noticed."""
    assert {path.name for path in GOLDEN.iterdir()} == {file_name(kind) for kind in payload_types()}


@pytest.mark.parametrize("kind", payload_types(), ids=lambda kind: kind.__name__)
def test_a_payload_as_it_was_shipped_still_means_the_same(kind: type[Any]) -> None:
    """Every field of the golden file is still there, with its value; decoding, strict in tests, finds none unknown."""
    data = (GOLDEN / file_name(kind)).read_bytes()
    message = decode(data, kind)
    assert not isinstance(message, Refused) or kind is Refused
    now, then = msgspec.json.decode(encode(message)), msgspec.json.decode(data)
    assert _only_what(then, now) == then


def _only_what(then: Any, now: Any) -> Any:
    """What stands in *now* of all that stood in *then*: fields that came later are left out, at any depth."""
    if is_mapping(then) and is_mapping(now):
        return {name: _only_what(value, now.get(name, "gone")) for name, value in then.items()}
    if is_list(then) and is_list(now) and len(then) == len(now):
        return [_only_what(*pair) for pair in zip(then, now, strict=True)]
    return now


@pytest.mark.parametrize("kind", payload_types(), ids=lambda kind: kind.__name__)
def test_only_the_fields_that_always_were_required_are(kind: type[Any]) -> None:
    """A field added to a message must have a default, else older peers are refused."""
    then = msgspec.json.decode((GOLDEN / file_name(kind)).read_bytes())
    required = {field.encode_name for field in msgspec.structs.fields(kind) if field.required}
    assert required <= then.keys()
