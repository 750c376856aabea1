"""Where a model comes from, as people write it: what each form means, and what is said about the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.modelsource import ModelSource, SourceError, parse, parse_all

SUM = "ab" * 32


def nothing_here(_path: str) -> bool:
    return False


def parsed(text: str) -> ModelSource:
    return parse(text, exists=nothing_here)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("/m/A-Q4_0.gguf", {"kind": "path", "path": Path("/m/A-Q4_0.gguf"), "model": "a", "fetched": False}),
        ("~/m", {"kind": "path", "path": Path.home() / "m"}),
        ("m/b.gguf", {"kind": "path", "path": Path("m/b.gguf")}),
        ("./org/repo", {"kind": "path", "path": Path("org/repo")}),
        ("a/b/c", {"kind": "path", "path": Path("a/b/c")}),
        (f"/m/a.gguf#sha256={SUM.upper()}", {"kind": "path", "sha256": SUM, "fetched": True}),
        ("/m/a.gguf#name=my%20model", {"kind": "path", "model": "my model", "fetched": True}),
        ("hf:org/Big-7B-GGUF", {"kind": "hub", "repo": "org/Big-7B-GGUF", "file": "", "model": "big-7b"}),
        ("hf://org/repo", {"kind": "hub", "location": "hf:org/repo"}),
        ("hf:org/repo:q8_0@v1.0", {"quantisation": "Q8_0", "revision": "v1.0", "location": "hf:org/repo:Q8_0@v1.0"}),
        ("hf:org/repo/x/M-Q4_K_M.gguf@main", {"file": "x/M-Q4_K_M.gguf", "revision": "main", "model": "m"}),
        ("org/repo", {"kind": "hub", "location": "hf:org/repo"}),
        ("org/repo:Q4_K_M", {"kind": "hub", "quantisation": "Q4_K_M"}),
        ("hf.co/org/repo:Q4_K_M", {"kind": "hub", "location": "hf:org/repo:Q4_K_M"}),
        ("https://huggingface.co/org/repo", {"kind": "hub", "location": "hf:org/repo"}),
        (
            "https://huggingface.co/org/repo/resolve/main/M.gguf?download=true",
            {"kind": "hub", "location": "hf:org/repo/M.gguf@main"},
        ),
        ("file:///mnt/a%20b.gguf", {"kind": "mirror", "path": Path("/mnt/a b.gguf"), "model": "a b"}),
        (
            f"https://h/M-Q4_0.gguf#name=m7&sha256={SUM}",
            {"kind": "web", "location": "https://h/M-Q4_0.gguf", "model": "m7", "sha256": SUM},
        ),
        (f"http://h:1/m.gguf?v=2#sha256={SUM}", {"kind": "web", "location": "http://h:1/m.gguf?v=2", "model": "m"}),
    ],
)
def test_each_form_says_where_a_model_comes_from(text: str, facts: dict[str, Any]) -> None:
    found = parsed(text)
    assert {name: getattr(found, name) for name in facts} == facts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the source of a model is empty"),
        ("hf:repo", "write hf:org/repo"),
        ("hf:org/repo/config.json", "config.json is no GGUF file"),
        ("hf:org/repo/m.gguf:Q4_0", "leave out :Q4_0"),
        ("hf:org/repo/../x.gguf", ".. in the name of a file"),
        ("file://server/m.gguf", "a share has to be mounted"),
        ("file:///mirror/", "name one GGUF file"),
        ("https://h/m.gguf", "needs its checksum: add #sha256=…"),
        (f"https://user:pass@h/m.gguf#sha256={SUM}", "a password in https://h…"),
        (f"https://h/m.bin#sha256={SUM}", "write https://host/path/FILE.gguf"),
        ("/m/a.gguf#sha256=abc", "'abc' is no SHA-256 checksum"),
        ("/m/a.gguf#sha256=", "write #sha256=…"),
        ("s3://bucket/m.gguf", "not from s3:"),
    ],
)
def test_what_names_no_source_is_refused_with_what_to_write(text: str, said: str) -> None:
    with pytest.raises(SourceError) as caught:
        parsed(text)
    assert said in str(caught.value)
    assert "pass" not in str(caught.value).replace("password", ""), "what may be a secret is not repeated"


def test_what_could_be_a_folder_or_a_repository_is_refused_with_both_ways_to_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess would fetch gigabytes, or serve something else than was meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "repo").mkdir(parents=True)
    with pytest.raises(SourceError, match=r"write \./org/repo or hf:org/repo"):
        parse("org/repo")
    assert parse("./org/repo").kind == "path"
    assert parse("hf:org/repo").kind == "hub"


def test_one_wrong_part_does_not_hide_the_others() -> None:
    found, wrong = parse_all("hf:org/a, ftp://x ,,/m/b.gguf")
    assert [source.location for source in found] == ["hf:org/a", "/m/b.gguf"]
    assert wrong == ["ftp://x: models come from paths, hf:, file: and https:, not from ftp:"]


@given(
    st.text(max_size=60)
    | st.builds(
        "{}{}{}".format,
        st.sampled_from(["", "hf:", "https://", "file:///"]),
        st.text("ab./:@#-", max_size=20),
        st.sampled_from(["", ".gguf"]),
    )
)
def test_any_text_is_a_source_or_refused(text: str) -> None:
    """And what it became means the same when it is written again."""
    try:
        found = parsed(text)
    except SourceError:
        return
    if found.kind == "hub":
        assert parsed(found.location) == found or found.name or found.sha256
