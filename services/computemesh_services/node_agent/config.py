"""What the node-agent can be told."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from computemesh.config import ConfigError, Entrance, Seconds, ServiceConfig
from computemesh.contracts.rolemesh import HEARTBEAT_S
from computemesh.ids import Id
from computemesh_services.node_agent.engines.backends import cpu
from computemesh_services.node_agent.engines.backends.choice import Choice

TOPIC: Final = "tasks."
"""What stands before a work type in the name of a topic."""

HAND_BACK_S: Final = 5.0
"""What is left of the time to drain for handing back what does not finish."""


class AgentConfig(ServiceConfig, frozen=True, kw_only=True):
    node_id: Annotated[Id, msgspec.Meta(extra={"env": ["WORKER_ID"]})]
    """The node this machine is."""
    machine_id: Annotated[str, msgspec.Meta(max_length=63)] = ""
    """Tells this machine from others; left out, it follows from the number that the system has for it."""
    models: str = ""
    """Models to serve: GGUF files, folders, and sources to fetch them from, separated by commas; left out, the
    embedded model."""
    models_dir: str = ""
    """Where models that were fetched are kept; left out, `models` in the mesh's folder."""
    models_fetch: Literal["start", "first_use"] = "start"
    """When a model is fetched that is not there: as soon as the node starts, or when it is first asked for."""
    models_max_gb: Annotated[float, msgspec.Meta(ge=0, le=1_000_000)] = 0.0
    """GiB that models that were fetched may take, all together; 0 = any amount."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 2
    """Work items that run at the same time."""
    work_cpus: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    """Logical CPUs that work items may ask for, all together; left out, all of the machine."""
    work_ram_mb: Annotated[int, msgspec.Meta(ge=0, le=2**40)] | None = None
    """MiB of RAM that work items may ask for, all together; left out, all of the machine."""
    llama_server: str = ""
    """The llama.cpp server to run, as a path or a name on PATH; left out, `llama-server` or the `xllamacpp` package."""
    llama_server_startup_timeout_s: Seconds = 30.0
    """How long a request waits for its model to be loaded, with the time until those who use another one are done."""
    llama_server_probe_interval_s: Seconds = 0.5
    """Between two looks at a server that starts, at most."""
    engine_start_max_s: Seconds = 600.0
    """A server that does not serve after so long is given up."""
    engine_hung_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    """An engine that has not answered for so long is killed and started again; 0 = never."""
    engine_slots: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    """Requests that an engine works on at the same time; 0 = as many as `slots`."""
    max_pending_requests_per_device: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 2
    """Requests that a device takes, those that its engine works on and those that wait; more are refused."""
    engine_idle_s: Annotated[float, msgspec.Meta(ge=0, le=366 * 86_400)] = 0.0
    """An engine that nobody has used for so long is ended; 0 = never."""
    engine_patience_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 5.0
    """How long requests for the model in memory may overtake one for another model."""
    engine_threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """CPU threads of an engine; 0 = chosen from the machine."""
    context_tokens: Annotated[int, msgspec.Meta(ge=256, le=1_048_576)] = 4096
    """Longest prompt and answer together, per request."""
    heartbeat_interval_s: Annotated[float, msgspec.Meta(gt=0, le=3600, extra={"env": ["HEARTBEAT_INTERVAL_SEC"]})] = (
        10.0
    )
    labels: str = ""
    """Labels of this node, such as `zone=a,disk=nvme`."""
    tags: Annotated[str, msgspec.Meta(extra={"env": ["WORKER_TAGS"]})] = ""
    """Tags of this node, such as `fast,disk=nvme`: labels, those without a value with the value `true`."""
    topics: Annotated[str, msgspec.Meta(extra={"env": ["TASK_TOPICS"]})] = ""
    """Work this node takes of what it could, such as `tasks.inference,tasks.ppo`; left out, all."""
    allow_commands: bool = False
    """Take items of type `command`, which run any program as the user that the agent runs as."""
    default_model: Annotated[str, msgspec.Meta(max_length=200, extra={"env": ["VLLM_MODEL"]})] = ""
    """For `inference` items that name no model; left out, the one in memory, or the first."""
    ppo_model: Annotated[str, msgspec.Meta(max_length=200, extra={"env": ["PPO_MODEL"]})] = ""
    """For `ppo` items that name no model."""
    results_dir: Annotated[str, msgspec.Meta(extra={"env": ["RESULTS_DIR"]})] = ""
    """Where each item has a folder for its result and files; left out, `work` in the mesh's folder."""
    finish_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 10.0
    """How long running work may go on when the agent is told to end, before it is handed back; at most 5 s less than
    `drain_timeout_s`."""
    work_keep_s: Seconds = 7 * 86_400.0
    """How long the files of an item stay on this machine."""
    backend: Choice = "auto"
    """How engines reach the devices: `cuda`, `rocm`, `metal`, `sycl`, `vulkan` or `cpu`; `auto` takes the first that
    finds devices and that the installed llama.cpp can use."""
    cpu_devices: str = cpu.NUMA
    """How the CPUs are split among engines: `numa`, a number, or sets such as `0-7,16-23 8-15,24-31`."""

    def cpu_plan(self) -> cpu.Plan:
        """How the CPUs are split."""
        try:
            return cpu.parse_plan(self.cpu_devices)
        except ValueError as error:
            raise ConfigError(f"COMPUTEMESH_CPU_DEVICES={self.cpu_devices!r}: {error}") from None

    client_api_keys: str = ""
    """Keys, separated by commas, of which callers of the HTTP edge must show one, on loopback too."""
    node_api_keys: str = ""
    """Keys, separated by commas, of which callers of `/v1/node/` must show one instead."""
    dispatcher_base_url: str = ""
    """RoleMesh's dispatcher, or whatever takes `/v1/nodes/register` and `/v1/nodes/heartbeat`, such as
    `https://dispatcher.example:8000`; left out, nothing is reported over HTTP."""
    dispatcher_key: str = ""
    """Shown to the dispatcher."""
    dispatcher_interval_s: Annotated[float, msgspec.Meta(ge=0.1, le=3600)] = HEARTBEAT_S
    """Between two heartbeats to the dispatcher, which calls a node stale after 30 s."""
    advertise_url: str = ""
    """Where the dispatcher's requests reach this node's HTTP edge; left out, the address it is bound to."""

    def answering_s(self) -> float:
        """What is left of the time to drain by the work that may go on, and its handing back."""
        return self.drain_timeout_s - self.finish_s - HAND_BACK_S

    def entrance(self) -> Entrance:
        """The mesh's token opens what the keys do."""
        given = {"/": _parts(self.client_api_keys), "/v1/node/": _parts(self.node_api_keys)}
        return Entrance(
            tokens=(self.token,) if self.token else (),
            keys={start: tuple(keys) for start, keys in given.items() if keys},
            missing="send Authorization: Bearer <key>, or X-Api-Key: <key>",
            wrong="that key is not one of this node's",
        )

    def label_map(self) -> dict[str, str]:
        """Labels and tags. A label counts before a tag of the same name."""
        pairs = [part.partition("=") for part in _parts(self.labels)]
        if any(not name.strip() or not equals for name, equals, _ in pairs):
            raise ConfigError(f"COMPUTEMESH_LABELS={self.labels!r}: write name=value, separated by commas")
        tags = [part.partition("=") for part in _parts(self.tags)]
        of_tags = {name.strip(): value.strip() if equals else "true" for name, equals, value in tags if name.strip()}
        return of_tags | {name.strip(): value.strip() for name, _, value in pairs}

    def topic_types(self) -> frozenset[str] | None:
        """The work types that `topics` names; None for all."""
        topics = _parts(self.topics)
        if any(not topic.removeprefix(TOPIC) or not topic.startswith(TOPIC) for topic in topics):
            raise ConfigError(f"TASK_TOPICS={self.topics!r}: write {TOPIC}<work type>, separated by commas")
        return frozenset(topic.removeprefix(TOPIC) for topic in topics) if topics else None


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
