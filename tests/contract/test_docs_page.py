"""The page at ``/docs``: every route is on it, nothing on it comes from elsewhere, and text on it stays text.

Method: pages are rendered from the documents in ``docs/reference`` and read with a parser. That the running edges
serve these documents and pages, and that the commands on them work, is shown in ``test_edge``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final, cast

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from computemesh.contracts import services
from computemesh.edge import page

REFERENCE: Final = Path(__file__).parents[2] / "docs" / "reference" / "openapi"
BASE_URL: Final = "http://127.0.0.1:8118"
HOSTILE: Final = "</p></code></style><script>alert(1)</script>\"><img src=x onerror='alert(1)'>`</code>`&lt;b&gt;"

every_document = pytest.mark.parametrize("name", [card.name for card in services.SERVICES])


def document(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((REFERENCE / f"{name}.json").read_text())
    return found


class Elements(HTMLParser):
    """What a browser makes of a page: its elements, and the text in each article."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.articles: dict[str, str] = {}
        self._article = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "article":
            self._article = str(dict(attrs)["id"])
            self.articles[self._article] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._article = ""

    def handle_data(self, data: str) -> None:
        if self._article:
            self.articles[self._article] += data

    def values(self, attribute: str) -> list[str]:
        return [str(attrs[attribute]) for _, attrs in self.found if attribute in attrs]


@every_document
def test_the_document_is_valid_openapi(name: str) -> None:
    """By the published schema of OpenAPI 3.1 and its rules."""
    assert document(name)["openapi"] == "3.1.0"
    validate(document(name), cls=OpenAPIV31SpecValidator)


@every_document
def test_every_route_is_on_the_page_with_all_that_is_known_of_it(name: str) -> None:
    """Method, path, parameters, body, statuses, an example, and the subject that does the same."""
    said = document(name)
    articles = Elements(page.render(said, BASE_URL, token=False)).articles
    for path, methods in said["paths"].items():
        for method, operation in methods.items():
            text = articles[operation["operationId"]]
            assert f"{method.upper()}{path}" in text
            assert operation["summary"].replace("`", "") in text
            for parameter in operation.get("parameters", []):
                assert parameter["name"] in text
            for status in operation["responses"]:
                assert status in text
            assert f"curl -s {'' if method == 'get' else f'-X {method.upper()} '}" in text
            assert operation.get("x-nats-subject", "") in text
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                assert schema["$ref"].rpartition("/")[2] in text
    for schema_name, schema in said["components"]["schemas"].items():
        for field in schema.get("properties", {}):
            assert field in articles[f"schema-{schema_name}"]


@every_document
def test_nothing_on_the_page_comes_from_elsewhere(name: str) -> None:
    """It renders on a machine without a network: no script, no resource, no link that leaves the edge."""
    text = page.render(document(name), BASE_URL, token=False)
    elements = Elements(text)
    foreign = {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    assert not {tag for tag, _ in elements.found} & foreign
    assert not elements.values("src")
    assert not elements.values("style")
    assert not [attribute for _, attrs in elements.found for attribute in attrs if attribute.startswith("on")]
    assert not re.search(r"url\(|@import|//", page.STYLE)
    ids = elements.values("id")
    assert len(set(ids)) == len(ids)
    for href in elements.values("href"):
        assert href.startswith("/") or href.removeprefix("#") in ids, href
        assert not href.startswith("//")


@every_document
def test_a_hostile_text_stays_text(name: str) -> None:
    """In any place a description, name or example can have: the page has the same elements as without it."""
    harmless, hostile = (spoil(document(name), text) for text in ("harmless", HOSTILE))
    clean = Elements(page.render(harmless, BASE_URL, token=True))
    spoilt = Elements(page.render(hostile, f"http://{HOSTILE}", token=True))
    assert {tag for tag, _ in spoilt.found} <= {tag for tag, _ in clean.found} | {"code"}
    assert {name for _, attrs in spoilt.found for name in attrs} == {name for _, attrs in clean.found for name in attrs}
    assert "alert(1)" in "".join(spoilt.articles.values())


STRUCTURAL: Final = {"$ref", "in", "type", "x-nats-subject"}
"""Keys whose values steer the rendering; what they hold is spoilt only where it is shown."""


def spoil(value: Any, text: str, key: object = "") -> Any:
    """A document with *text* after every string in it."""
    match value:
        case dict():
            return {name: spoil(inner, text, name) for name, inner in cast("dict[str, Any]", value).items()}
        case list():
            return [spoil(inner, text, key) for inner in value]  # pyright: ignore[reportUnknownVariableType]
        case str() if key not in STRUCTURAL:
            return value + text
        case _:
            return value


def test_hostile_paths_names_and_subjects_stay_text() -> None:
    """Those that are keys of the document, too."""
    operation = {
        "summary": HOSTILE,
        "operationId": HOSTILE,
        "x-nats-subject": HOSTILE,
        "parameters": [{"name": HOSTILE, "in": HOSTILE, "required": False, "schema": {"type": HOSTILE}}],
        "responses": {HOSTILE: {"description": HOSTILE, "content": {HOSTILE: {"schema": {"$ref": HOSTILE}}}}},
    }
    schema = {"properties": {HOSTILE: {"enum": [HOSTILE], "default": HOSTILE, "maximum": HOSTILE}}}
    said = {
        "info": {"title": HOSTILE, "version": HOSTILE, "description": HOSTILE},
        "paths": {HOSTILE: {HOSTILE: operation}},
        "components": {"schemas": {HOSTILE: schema}},
    }
    elements = Elements(page.render(said, HOSTILE, token=False))
    assert not {tag for tag, _ in elements.found} & {"script", "img", "b"}
    assert not elements.values("onerror")
    assert elements.values("id").count(HOSTILE) == 1


def commands(text: str) -> Iterator[list[str]]:
    for command in re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL):
        yield shlex.split(unescape(command))


def test_what_is_in_an_example_cannot_leave_its_word_of_the_command() -> None:
    """A shell that is given the command runs nothing but curl, and sends exactly the example."""
    said = document("work-marshaller")
    trap = "'; touch /tmp/x; echo \" $(id) `id` \\ \n#"
    submit = said["paths"]["/api/v1/work/submit"]["post"]
    submit["requestBody"]["content"]["application/json"]["example"] = {"work_type": trap}
    listing = said["paths"]["/api/v1/work"]["get"]
    listing["parameters"][0]["example"] = trap
    found = list(commands(page.render(said, BASE_URL, token=False)))
    (post,) = [words for words in found if words[:4] == ["curl", "-s", "-X", "POST"]]
    assert json.loads(post[-1]) == {"work_type": trap}
    assert post[4] == f"{BASE_URL}/api/v1/work/submit"
    assert len(post) == 9
    (get,) = [words for words in found if len(words) == 3 and words[2].startswith(f"{BASE_URL}/api/v1/work?")]
    assert "touch%20" in get[2] or "touch+" in get[2]


def test_commands_show_the_token_where_one_is_demanded() -> None:
    """From the environment, so that it is not on the page; doors that are open to all need none."""
    text = page.render(document("work-marshaller"), BASE_URL, token=True)
    for words in commands(text):
        is_open = words[-1].endswith(("/healthz", "/readyz", "/metrics"))
        assert ("Authorization: Bearer $COMPUTEMESH_TOKEN" in words) is (words[0] == "curl" and not is_open)
    assert "Authorization" not in page.render(document("work-marshaller"), BASE_URL, token=False)
