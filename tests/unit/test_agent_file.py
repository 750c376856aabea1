"""Goal: a node-agent is told by a file what the environment could tell it, and which models it serves; what is wrong in
the file is said with its key and its place.

Method: the texts of files, and the example of the documentation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from computemesh.config import ConfigError
from computemesh.config import load as load_settings
from computemesh.contracts.base import Refused
from computemesh_services.node_agent.config import AgentConfig
from computemesh_services.node_agent.config_file import ConfigFile, ModelEntry, load, parse
from computemesh_services.node_agent.engines.options import EngineOptions, ModelOptions
from computemesh_services.node_agent.engines.place import EngineError
from computemesh_services.node_agent.engines.server import arguments

EXAMPLE: Final = Path(__file__).parents[2] / "docs" / "examples" / "agent" / "node-agent.yaml"
FOLDER: Final = Path("/etc/mesh")


def read(text: str) -> ConfigFile:
    found = parse(text.encode(), FOLDER)
    assert isinstance(found, ConfigFile), found
    return found


def reason(text: str) -> str:
    found = parse(text.encode(), FOLDER)
    assert isinstance(found, Refused)
    return found.reason


def test_the_example_of_the_documentation_is_what_it_says() -> None:
    told = load(EXAMPLE)
    config = load_settings(AgentConfig, {}, told.settings)
    assert (config.node_id, config.http_host, config.http_port) == ("render-01", "127.0.0.1", 8091)
    assert config.label_map() == {"zone": "a", "disk": "nvme"}
    assert (config.backend, config.cpu_plan()) == ("auto", "numa")
    chat, embed = told.model_options()
    assert chat == ModelOptions(
        name="qwen3-8b",
        path=EXAMPLE.parent / "models" / "Qwen3-8B-Q4_K_M.gguf",
        alias="chat",
        roles=("chat",),
        ctx_size=8192,
        batch_size=2048,
        ubatch_size=512,
        threads=8,
        threads_batch=16,
        gpu_layers=99,
        main_gpu=0,
        tensor_split=(3.0, 1.0),
        flash_attn="auto",
        server_args={"mlock": True, "cache-type-k": "q8_0"},
    )
    assert embed.embeddings


def test_the_example_uses_every_key_of_a_model_but_those_that_fetch_it() -> None:
    text = EXAMPLE.read_text()
    unused = {name for name in ModelEntry.__struct_fields__ if not re.search(rf"\b{name}:", text)}
    assert unused == {"source", "sha256", "embeddings"}


def test_every_setting_of_the_agent_is_a_key() -> None:
    """Those that the supervisor alone sets are not, and ``models`` is more than paths here."""
    for name in set(AgentConfig.__struct_fields__) - {"ready_fd", "models"}:
        refused = parse(f"{name}: {{}}\n".encode(), FOLDER)
        assert not isinstance(refused, Refused) or refused.code == "bad_config", name
    assert "unknown key" in reason("ready_fd: 3\n")


def test_the_environment_counts_before_the_file() -> None:
    told = read("node_id: a\nslots: 3\nheartbeat_interval_s: 1\n").settings
    config = load_settings(AgentConfig, {"COMPUTEMESH_SLOTS": "5", "WORKER_ID": "b"}, told)
    assert (config.node_id, config.slots, config.heartbeat_interval_s) == ("b", 5, 1.0)


def test_paths_start_at_the_folder_of_the_file() -> None:
    text = """
results_dir: work
models:
- {model_id: a, path: m/a.gguf}
- {model_id: b, path: /srv/b.gguf}
- {model_id: c, path: ~/c.gguf}
- {model_id: d, source: "hf:org/repo"}
"""
    told = read(text)
    assert told.settings == {"results_dir": "/etc/mesh/work"}
    assert [model.path for model in told.model_options()] == [
        Path("/etc/mesh/m/a.gguf"),
        Path("/srv/b.gguf"),
        Path("~/c.gguf").expanduser(),
        None,
    ]
    assert told.models is not None
    assert told.models[3].source == "hf:org/repo"


def test_settings_that_are_several_things_may_be_lists() -> None:
    told = read("labels: {zone: a, rack: 7}\ntags: [fast, disk=nvme]\ncpu_devices: ['0-3', '4-7']\n").settings
    assert told == {"labels": "zone=a,rack=7", "tags": "fast,disk=nvme", "cpu_devices": "0-3 4-7"}
    assert read("cpu_devices: 2\n").settings == {"cpu_devices": "2"}


@pytest.mark.parametrize(
    ("told", "passed"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on"), ("'on'", "on"), ("null", None)]
)
def test_flash_attention_is_switched_by_words_that_yaml_reads_as_true_and_false(told: str, passed: str | None) -> None:
    (model,) = read(f"models: [{{model_id: a, path: a, flash_attn: {told}}}]\n").model_options()
    assert model.flash_attn == passed


def test_a_split_over_gpus_may_be_written_as_llama_server_takes_it() -> None:
    (model,) = read("models: [{model_id: a, path: a, tensor_split: '3,1'}]\n").model_options()
    assert model.tensor_split == (3.0, 1.0)


def test_a_role_may_say_that_a_model_gives_embeddings_and_a_key_may_say_that_it_does_not() -> None:
    told = read(
        "models: [{model_id: a, path: a, roles: [embedding]}, {model_id: b, path: b, embeddings: true},"
        " {model_id: c, path: c, roles: [embedding], embeddings: false}]\n"
    )
    assert [model.embeddings for model in told.model_options()] == [True, True, False]


def test_a_file_that_names_no_models_leaves_them_to_the_environment() -> None:
    assert read("slots: 1\n").models is None
    assert read("models: []\n").models == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("listen_prot: 8091\n", "listen_prot: unknown key (line 1, column 1); did you mean listen_port?"),
        (
            "models:\n- model_id: a\n  path: a\n  ctx_sise: 5\n",
            "models[0].ctx_sise: unknown key (line 4, column 3); did you mean ctx_size?",
        ),
        (
            "models:\n- model_id: a\n  path: a\n  ctx_size: '8k'\n",
            "models[0].ctx_size: Expected 'int | null', got 'str' (line 4, column 3)",
        ),
        (
            "models:\n- model_id: a\n  path: a\n  server_args: {mlock: [1]}\n",
            "models[0].server_args[...]: Expected 'bool | int | float | str', got 'array' (line 4, column 3)",
        ),
        (
            "models:\n- model_id: a\n  path: a\n  server_args:\n    mlock: true\n    host: 0.0.0.0\n",
            "models[0].server_args.host: server_args do not take host, which is up to the agent (line 6, column 5)",
        ),
        (
            "models: [{model_id: a, path: a, server_args: {--ctx_size: 9}}]\n",
            (
                "models[0].server_args.--ctx_size: server_args do not take ctx-size; "
                "a model has the key ctx_size for it (line 1, column 47)"
            ),
        ),
        (
            "models: [{model_id: a, path: a, server_args: {mlock: --host=0.0.0.0}}]\n",
            "models[0].server_args.mlock: '--host=0.0.0.0' would be an argument of its own (line 1, column 47)",
        ),
        ("models:\n- path: a\n", "models[0].model_id: Object missing required field 'model_id' (line 2, column 3)"),
        ("models:\n- model_id: a\n", "models[0]: a has neither a path nor a source (line 2, column 3)"),
        (
            "models:\n- {model_id: a, path: a}\n- {model_id: b, path: b, alias: a}\n",
            "models[1].alias: 'a' is already models[0].model_id (line 3, column 26)",
        ),
        (
            "models: [{model_id: a, path: a, tensor_split: x}]\n",
            "models[0].tensor_split: 'x' is no list of numbers (line 1, column 33)",
        ),
        (
            "models: a.gguf\n",
            "models: Expected a list of models, each with a model_id (line 1, column 1)",
        ),
        (
            "models: [a.gguf]\n",
            "models[0]: Expected a model, such as `model_id: tiny` with a path (line 1, column 10)",
        ),
        (
            "models: [{model_id: a, source: 'ftp://x/y.gguf'}]\n",
            (
                "models[0].source: ftp://x/y.gguf: models come from paths, hf:, file: and https:, not from ftp: "
                "(line 1, column 24)"
            ),
        ),
        ("slots: '2'\n", "slots: Expected 'int', got 'str' (line 1, column 1)"),
        ("slots: 0\n", "slots: Expected 'int' >= 1 (line 1, column 1)"),
        ("backend: gpu\n", "backend: 'gpu' is none of auto, cpu, cuda, metal, rocm, sycl, vulkan (line 1, column 1)"),
        (
            "listen_port: 1\nhttp_port: 2\n",
            "http_port: listen_port and http_port are one setting; keep one of them (line 2, column 1)",
        ),
        ("labels: {a: [1]}\n", "labels: Expected a word or a number (line 1, column 1)"),
        ("tags: [yes]\n", "tags[0]: Expected 'str', got 'bool'; put it in quotes (line 1, column 8)"),
        ("tags: ['a,b']\n", "tags: 'a,b' has a ',' in it, which separates one from the next (line 1, column 1)"),
        ("[1]\n", "it is no mapping of settings, such as `node_id: render-01`"),
        ("", "Invalid YAML: there is nothing in it"),
        ("slots: 1\nslots: 2\n", "Invalid YAML: line 2, column 1: slots stands twice, first at line 1, column 1"),
    ],
)
def test_what_is_wrong_is_said_with_its_key_and_its_place(text: str, said: str) -> None:
    assert reason(text) == said


@pytest.mark.parametrize(
    "name",
    [
        *("host", "--host", "port", "reuse-port", "reuse_port", "m", "-m", "model", "--model", "a", "alias", "hf-repo"),
        *("api-key", "--api_key", "api-key-file", "ssl-key-file", "ssl-cert-file", "path", "media-path", "tools"),
        *("slot-save-path", "log-file", "log_file", "ngl", "np", "parallel", "models-dir", "fim-qwen-7b-spec"),
        *("gpt-oss-20b-default", "host=0.0.0.0"),
    ],
)
def test_arguments_that_are_the_agents_are_refused_however_they_are_spelled(name: str) -> None:
    """By the file and, where it was passed by, before a server is started."""
    place = "(line 1, column 47)"
    said = reason(f"models: [{{model_id: a, path: a, server_args: {{'{name}': false}}}}]\n")
    assert said.startswith(f"models[0].server_args.{name}: server_args do not take "), said
    assert said.endswith(place)
    model = ModelOptions(name="a", server_args={name: "x"})
    with pytest.raises(EngineError, match="the engine for 'a' is not started: server_args do not take "):
        arguments(model, Path("a.gguf"), 1, options=EngineOptions())


def test_other_arguments_are_passed_on() -> None:
    """Numbers below 0 as well."""
    told = read(
        "models: [{model_id: a, path: a, server_args: {mlock: true, n-predict: -1, keep: '-1', pooling: mean}}]\n"
    )
    (model,) = told.model_options()
    line = " ".join(arguments(model, Path("a.gguf"), 1, options=EngineOptions()))
    assert line.endswith("--metrics --mlock --n-predict -1 --keep -1 --pooling mean")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"agent\.yaml: no such file or directory$"):
        load(tmp_path / "agent.yaml")
    (tmp_path / "agent.yaml").write_text("slots: x\n")
    with pytest.raises(ConfigError, match=r"agent\.yaml: slots: Expected 'int', got 'str' \(line 1, column 1\)$"):
        load(tmp_path / "agent.yaml")


def test_a_file_with_secrets_that_others_may_read_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("token: s3cret\nslots: 1\n")
    file.chmod(0o644)
    assert load(file).warnings == [f"{file} holds token, and others may read it: chmod 600"]
    file.chmod(0o600)
    assert load(file).warnings == ()


def test_cpus_that_are_split_as_they_cannot_be_stop_the_agent_with_the_name_of_the_setting() -> None:
    config = load_settings(AgentConfig, {"COMPUTEMESH_NODE_ID": "a", "COMPUTEMESH_CPU_DEVICES": "0-x"})
    with pytest.raises(ConfigError, match=r"^COMPUTEMESH_CPU_DEVICES='0-x': '0-x' is no set of CPUs"):
        config.cpu_plan()
