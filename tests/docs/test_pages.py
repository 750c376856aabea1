"""The pages say what is true: links lead somewhere, and what they quote is what stands in the files.

A fenced block under ``<!-- file: PATH -->`` is a quotation of that file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]

QUOTED: Final = re.compile(r"(?ms)^<!-- file: (?P<path>\S+) -->\n(?P<fence>`{3,})\w*\n(?P<text>.*?)^(?P=fence)$")
MARK: Final = re.compile(r"(?m)^<!-- file: (\S+) -->$")
LINK: Final = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
BLOCK: Final = re.compile(r"(?ms)^(?P<fence>`{3,}).*?^(?P=fence)$")
HEADING: Final = re.compile(r"(?m)^#+ (.*)$")


def pages() -> list[str]:
    """Every Markdown file of the tree, but none in hidden folders."""
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))


def anchors(page: Path) -> set[str]:
    """The names under which the headings of a page can be linked to."""
    headings = HEADING.findall(BLOCK.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", pages())
def test_every_relative_link_leads_to_a_file_and_a_heading(name: str) -> None:
    """Links to other sites are not followed."""
    page = ROOT / name
    for link in LINK.finditer(BLOCK.sub("", page.read_text())):
        target, _, anchor = link["target"].partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        found = (page.parent / target) if target else page
        assert found.exists(), f"{name}: {link['target']}: there is no {found}"
        assert found.resolve().is_relative_to(ROOT), f"{name}: {link['target']} leads out of the tree"
        assert not anchor or anchor in anchors(found), f"{name}: {link['target']}: no such heading"


@pytest.mark.parametrize("name", pages())
def test_a_quoted_file_is_quoted_as_it_is(name: str) -> None:
    """Whoever changes an example changes the page, or the other way round."""
    for quote in QUOTED.finditer((ROOT / name).read_text()):
        assert (ROOT / quote["path"]).read_text() == quote["text"], f"{name} quotes another {quote['path']}"


def test_every_example_is_quoted_on_a_page_and_every_mark_has_its_quotation() -> None:
    """No example that nobody reads, no mark that a typing error has switched off."""
    texts = [(ROOT / name).read_text() for name in pages()]
    quoted = {quote["path"] for text in texts for quote in QUOTED.finditer(text)}
    marked = {path for text in texts for path in MARK.findall(text)}
    examples = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "docs" / "examples").rglob("*")
        if path.is_file() and not {"__pycache__", ".pytest_cache"} & set(path.parts)
    }
    assert quoted == marked
    assert examples <= quoted


def test_every_decision_has_a_number_of_its_own() -> None:
    """The one in its name is the one in its heading, and none is left out."""
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    headings = [int(path.read_text().removeprefix("# ").partition(".")[0]) for path in decisions]
    assert headings == [int(path.name.partition("-")[0]) for path in decisions] == list(range(1, len(decisions) + 1))
