"""MLOC's task files: what each field becomes, and that a wrong one is named with its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from computemesh import inference, mloc, yamltext
from computemesh.contracts.base import Refused
from computemesh.contracts.work import TASK_TEXT, WorkItem
from computemesh.yamltext import Document

TASK = """\
apiVersion: mloc/v1
kind: InferenceTask
metadata:
  name: two-prompts
  owner: alice

spec:
  taskType: "inference"

  resources:
    replicas: 1
    hardware:
      cpu: "8"
      memory: "32Gi"
      gpu:
        type: "any"
        count: 1

  model:
    source:
      type: "huggingface"
      identifier: "mistralai/Mistral-7B-Instruct-v0.1"
    vllm:
      tensor_parallel_size: 1

  inference:
    max_tokens: 128
    temperature: 0.7
    prompts:
      - "Explain quantum computing in simple terms."
      - "Write a Python function to sort a list."
"""

TRAINING = """\
apiVersion: mloc/v1
kind: TrainingTask
metadata: {name: ppo, owner: alice}
spec:
  taskType: ppo
  resources:
    replicas: 2
    tags: [fast, zone=a]
    hardware: {cpu: 500m, memory: 1.5G, gpu: {type: H100, count: 4}}
  model:
    source: {identifier: some/model}
    config: {fp16: true}
  training: {learning_rate: 1.41e-5, steps: 5e1}
  priority: 7
  timeoutSeconds: 60
  retries: 0
  after: first
  deadline: 2030-01-31T12:00:00Z
"""


EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "tasks" / "inference.yaml"


def test_the_example_of_the_guide_is_a_task() -> None:
    assert item(EXAMPLE.read_text()).payload["prompts"][1] == "Write a Python function to sort a list."


def item(text: str) -> WorkItem:
    found = made(text)
    assert isinstance(found, WorkItem), found
    return found


def made(text: str) -> WorkItem | Refused:
    document = yamltext.read(text)
    return document if isinstance(document, Refused) else mloc.item_of(document)


def test_an_inference_task_becomes_an_item_with_its_prompts() -> None:
    """Requirements from its resources, settings of the generation in the payload, the text as an annotation."""
    found = item(TASK)
    assert (found.work_type, found.model_name, found.owner) == (
        "inference",
        "mistralai/Mistral-7B-Instruct-v0.1",
        "alice",
    )
    assert found.payload == {
        "max_tokens": 128,
        "temperature": 0.7,
        "prompts": ["Explain quantum computing in simple terms.", "Write a Python function to sort a list."],
    }
    assert (found.requirements.cpus, found.requirements.ram_mb, found.requirements.gpus) == (8, 32 * 1024, 1)
    assert found.requirements.gpu_model == ""
    assert found.annotations == {TASK_TEXT: TASK}
    assert found.work_id is None


def test_a_task_of_another_type_passes_its_parts_on_to_the_executor() -> None:
    """What is the scheduler's does not reach the executor, and the rest does as it is written."""
    found = item(TRAINING)
    assert found.payload == {
        "model": {"source": {"identifier": "some/model"}, "config": {"fp16": True}},
        "training": {"learning_rate": 1.41e-5, "steps": 50.0},
    }
    asked = found.requirements
    assert (asked.cpus, asked.ram_mb, asked.gpus, asked.gpu_model) == (1, 1536, 4, "H100")
    assert asked.labels == {"fast": "true", "zone": "a"}
    assert (found.replicas, found.priority, found.timeout_s, found.retries_max) == (2, 7, 60.0, 0)
    assert (found.after, found.deadline_at) == (["first"], 1_896_091_200.0)


def test_a_list_of_data_is_a_list_of_prompts_and_a_system_prompt_stands_before_each() -> None:
    """MLOC's other form of a task, and how it joins the two."""
    data = TASK.replace("    prompts:\n", "    system_prompt: Be brief.\n").replace("      - ", "    # ")
    data += "  data:\n    type: list\n    items: [one, two]\n"
    assert item(data).payload["prompts"] == ["Be brief.\none", "Be brief.\ntwo"]


def test_a_system_prompt_is_the_first_message_of_a_chat() -> None:
    text = TASK.partition("    prompts:")[0] + "    systemPrompt: S\n    messages: [{role: user, content: U}]\n"
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert item(text).payload["messages"] == said
    several = text.replace("messages: ", "messages: [").rstrip() + ", [{role: user, content: V}]]\n"
    assert item(several).payload["messages"] == [said, [said[0], {"role": "user", "content": "V"}]]


def test_a_field_that_is_empty_is_one_that_was_left_out() -> None:
    assert (
        item(TASK.replace("owner: alice", "owner:").replace('type: "any"\n        count: 1', "")).requirements.gpus == 0
    )


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [("8", 8), (8, 8), ("500m", 1), ("1500m", 2), (0.5, 1), ("2.0", 2), ("0", 0)],
)
def test_cpus_are_whole_and_rounded_up(quantity: Any, expected: int) -> None:
    assert mloc.cpus(quantity) == expected


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [("32Gi", 32_768), ("32G", 32_768), ("32gb", 32_768), ("32GiB", 32_768), ("512Mi", 512), ("512m", 512),
     ("1Ti", 2**20), ("1025Ki", 2), (2**30, 1024), ("1073741825", 1025), ("1.5Gi", 1536), ("0", 0)],
)  # fmt: skip
def test_units_of_memory_are_binary_in_any_spelling(quantity: Any, expected: int) -> None:
    assert mloc.memory_mb(quantity) == expected


WRONG = [
    ("replicas: 1", "replica: 1", "spec.resources.replica", 11),
    ("replicas: 1", "replicas: 0", "spec.resources.replicas", 11),
    ("replicas: 1", "replicas: 65", "spec.resources.replicas", 11),
    ('cpu: "8"', "cpu: 8 cores", "spec.resources.hardware.cpu", 13),
    ('cpu: "8"', "cpu: -1", "spec.resources.hardware.cpu", 13),
    ('cpu: "8"', "cpu: [8]", "spec.resources.hardware.cpu", 13),
    ('"32Gi"', "32Ei", "spec.resources.hardware.memory", 14),
    ('"32Gi"', "true", "spec.resources.hardware.memory", 14),
    ("count: 1", "count: -1", "spec.resources.hardware.gpu.count", 17),
    ("count: 1", "cont: 1", "spec.resources.hardware.gpu.cont", 17),
    ("count: 1", "", "spec.resources.hardware.gpu.count", 15),
    ("owner: alice", "ownr: alice", "metadata.ownr", 5),
    ("owner: alice", "owner: [a]", "metadata.owner", 5),
    ("owner: alice", "id: a.b", "metadata.id", 5),
    ("owner: alice", "labels: {a: 1}", "metadata.labels[...]", 5),
    ("owner: alice", "annotations: {mloc/task: x}", "metadata.annotations.mloc/task", 5),
    ("name: two-prompts", "nam: x", "metadata.nam", 4),
    ("name: two-prompts", "", "metadata.name", 3),
    ("apiVersion: mloc/v1", "", "apiVersion", 0),
    ("kind: InferenceTask", "kinds: x\nkind: y", "kinds", 2),
    ('taskType: "inference"', "taskType: [x]", "spec.taskType", 8),
    ('taskType: "inference"', "taskType: inference\n  priority: 12", "spec.priority", 9),
    ('taskType: "inference"', "taskType: inference\n  after: [a, b.c]", "spec.after[1]", 9),
    ('taskType: "inference"', "taskType: inference\n  deadline: tomorrow", "spec.deadline", 9),
    ('taskType: "inference"', "taskType: inference\n  deadline: 2030-01-31", "spec.deadline", 9),
    ('taskType: "inference"', "taskType: inference\n  timeoutSeconds: 0", "spec.timeoutSeconds", 9),
    ('taskType: "inference"', "taskType: inference\n  retries: many", "spec.retries", 9),
    ('taskType: "inference"', "taskType: inference\n  data: {type: dataset}", "spec.data", 9),
    ('taskType: "inference"', "taskType: inference\n  training: {}", "spec.training", 9),
    ("prompts:", "promts:", "spec.inference.promts", 29),
    ("hardware:", "hardwares:", "spec.resources.hardwares", 12),
    ("  inference:", "  inferense:", "spec.inferense", 26),
    ("prompts:", "xprompts:\n    prompts:", "spec.inference.xprompts", 29),
    ("prompts:", "prompts: hello\n    stop:", "spec.inference.prompts", 29),
    ("prompts:", "prompts:\n      - 3", "spec.inference.prompts[0]", 30),
    ("max_tokens: 128", "max_tokens: lots", "spec.inference.max_tokens", 27),
    ("temperature: 0.7", "temperature: -1", "spec.inference.temperature", 28),
    ("temperature: 0.7", "messages: [{role: user}]", "spec.inference.messages[0].content", 28),
    ("prompts:", "prompt: x\n    prompts:", "spec.inference.prompts", 30),
    ("    max_tokens: 128", "    system_prompt: 3", "spec.inference.system_prompt", 27),
    ("identifier:", "identifier: [x] #", "spec.model.source.identifier", 22),
]


@pytest.mark.parametrize(("right", "wrong", "field", "line"), WRONG, ids=[f"{w[1]}" for w in WRONG])
def test_a_wrong_field_is_named_with_its_line(right: str, wrong: str, field: str, line: int) -> None:
    """Or, where it is missing, the line of what it belongs into."""
    assert right in TASK
    found = made(TASK.replace(right, wrong))
    assert isinstance(found, Refused), found
    assert (found.code, found.field, found.status) == ("bad_task", field, 400), found
    if line:
        assert f"(line {line}, column " in found.reason, found.reason


def test_what_is_missing_is_said_in_the_words_of_mloc() -> None:
    found = made(TASK.replace("name: two-prompts", ""))
    assert isinstance(found, Refused)
    assert found.reason.startswith("Missing required field: metadata.name")


@pytest.mark.parametrize(
    ("right", "wrong", "meant"),
    [("replicas", "replica", "replicas"), ("hardware", "hardwares", "hardware"), ("prompts:", "promptz:", "prompt")],
)
def test_a_misspelt_field_is_told_before_the_one_that_is_missing_for_it(right: str, wrong: str, meant: str) -> None:
    found = made(TASK.replace(right, wrong))
    assert isinstance(found, Refused)
    assert f"{wrong.strip(':')}: no such field; did you mean {meant}?" in found.reason


def test_prompts_in_data_that_the_executor_would_refuse_are_named_where_they_stand() -> None:
    data = TASK.partition("    prompts:")[0] + f"  data: {{type: list, items: [{'x, ' * 1025}]}}\n"
    found = made(data)
    assert isinstance(found, Refused)
    assert (found.field, "(line 29, column " in found.reason) == ("spec.data.items", True)


def test_a_data_set_is_refused_by_its_name() -> None:
    """It is not taken for an empty list of prompts."""
    text = TASK.partition("    prompts:")[0] + "  data: {type: dataset, url: openai/gsm8k}\n"
    found = made(text)
    assert isinstance(found, Refused)
    assert (found.field, "'dataset' is not supported" in found.reason) == ("spec.data.type", True)


def test_a_refusal_of_the_item_names_the_field_of_the_task() -> None:
    document = yamltext.read(TASK)
    assert isinstance(document, Document)
    refused = Refused(code="unknown_work_type", field="work_type", reason="no node does it")
    told = mloc.told_in_its_words(refused, document)
    assert (told.field, told.reason) == ("spec.taskType", "spec.taskType: no node does it (line 8, column 3)")


def test_tags_and_labels_are_the_same_seen_from_two_sides() -> None:
    assert mloc.tags_of({"zone": "a", "fast": "true"}) == ["fast", "zone=a"]


FIELDS = re.findall(r"^ *(?:- )?(\w+):", TASK, re.MULTILINE)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), max_size=3))
def test_whatever_stands_in_a_field_is_an_item_or_a_refusal(spoilt: list[tuple[str, Any]]) -> None:
    """And an item can be sent, and its payload is one that the executor takes."""
    document = yamltext.read(TASK)
    assert isinstance(document, Document)

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: dict(spoilt).get(k, spoil(v)) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return value

    found = mloc.item_of(Document(spoil(document.value), TASK, document.places))
    if isinstance(found, WorkItem):
        assert found.work_type != "inference" or not isinstance(inference.parse(found.payload), Refused)
        assert msgspec.json.decode(msgspec.json.encode(found), type=WorkItem) == found
    else:
        assert found.reason
