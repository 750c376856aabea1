"""Which file of a repository is the model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh_services.node_agent.models.choice import PREFERRED, NoChoice, choose, file_and_parts, type_of

REPO = [
    "README.md",
    "M-7B-Q2_K.gguf",
    "M-7B-Q4_K_M.gguf",
    "M-7B-Q8_0.gguf",
    "M-7B-UD-Q4_K_XL.gguf",
    "M-7B-f16-00001-of-00002.gguf",
    "M-7B-f16-00002-of-00002.gguf",
    "mmproj-M-7B-f16.gguf",
    "imatrix_M.gguf",
]


def test_without_a_wish_the_best_quantisation_is_taken() -> None:
    """Small enough to be fast, large enough to lose little; never a projector."""
    assert choose(REPO) == ["M-7B-Q4_K_M.gguf"]
    assert choose([name for name in REPO if "Q4" not in name]) == ["M-7B-Q8_0.gguf"]
    assert choose(["one.gguf", "mmproj-one.gguf"]) == ["one.gguf"]


def test_the_quantisation_that_is_asked_for_is_taken_in_any_case() -> None:
    assert choose(REPO, "q2_k") == ["M-7B-Q2_K.gguf"]
    assert choose(REPO, "Q4_K_XL") == choose(REPO, "UD-Q4_K_XL") == ["M-7B-UD-Q4_K_XL.gguf"]


def test_all_parts_of_a_model_are_taken_in_order() -> None:
    """Engines are given the first one."""
    parts = ["M-7B-f16-00001-of-00002.gguf", "M-7B-f16-00002-of-00002.gguf"]
    assert choose(REPO, "F16") == parts
    assert file_and_parts(REPO, parts[0]) == parts
    assert choose(["Q8_0/m-00002-of-00002.gguf", "Q8_0/m-00001-of-00002.gguf"], "Q8_0") == [
        "Q8_0/m-00001-of-00002.gguf",
        "Q8_0/m-00002-of-00002.gguf",
    ]


def test_a_model_that_lacks_a_part_is_none() -> None:
    names = ["m-Q4_0-00001-of-00003.gguf", "m-Q4_0-00003-of-00003.gguf"]
    with pytest.raises(NoChoice, match="no GGUF file in it"):
        choose(names)
    with pytest.raises(NoChoice, match="only 2 of 3 parts"):
        file_and_parts(names, names[0])


def test_a_refusal_names_what_there_is() -> None:
    with pytest.raises(NoChoice, match="no file in it is Q5_0; there is: F16, Q2_K, Q4_K_M, Q8_0, UD-Q4_K_XL"):
        choose(REPO, "Q5_0")
    with pytest.raises(NoChoice, match=r"name one: a-Q4_0\.gguf, b-Q4_0\.gguf"):
        choose(["a-Q4_0.gguf", "b-Q4_0.gguf"])
    with pytest.raises(NoChoice, match=r"no file x\.gguf in it; there is: M-7B-Q2_K"):
        file_and_parts(REPO, "x.gguf")
    with pytest.raises(NoChoice, match="no GGUF file in it"):
        choose(["README.md", "model.safetensors"])


@given(st.lists(st.sampled_from(PREFERRED), min_size=1, unique=True))
def test_the_order_of_preference_is_the_one_that_is_written_down(types: list[str]) -> None:
    """For every set of quantisations that a repository may have."""
    best = next(one for one in PREFERRED if one in types)
    assert choose(f"m-{one}.gguf" for one in types) == [f"m-{best}.gguf"]
    assert all(type_of(f"m.{one.lower()}.gguf") == one for one in types)
