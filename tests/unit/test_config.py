"""Settings: read from the environment, and explained when they cannot be used."""

from __future__ import annotations

import logging
from typing import Annotated

import msgspec
import pytest

from computemesh import supervisor
from computemesh.config import ConfigError, ServiceConfig, load, nats_urls, node_of, told_node_id
from computemesh.contracts.base import Role
from computemesh_services.node_agent.config import AgentConfig
from computemesh_services.node_registry.config import RegistryConfig
from computemesh_services.resource_detector.config import DetectorConfig
from computemesh_services.work_marshaller.config import MarshallerConfig

KINDS = (AgentConfig, DetectorConfig, MarshallerConfig, RegistryConfig)


class Sized(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration with a name of another system."""

    size: Annotated[int, msgspec.Meta(ge=1, extra={"env": ["OLD_SIZE", "OLDER_SIZE"]})] = 7


def test_nothing_set_gives_the_defaults() -> None:
    """A service starts on loopback with nothing but its defaults."""
    config = load(ServiceConfig, {})
    assert config == ServiceConfig()
    assert (config.nats_url, config.http_host, config.token) == ("nats://127.0.0.1:4222", "127.0.0.1", "")
    assert not config.allow_open


def test_each_field_is_read_from_its_name_with_the_prefix() -> None:
    """Text becomes what the field holds."""
    config = load(
        ServiceConfig,
        {
            "COMPUTEMESH_HTTP_HOST": "::1",
            "COMPUTEMESH_HTTP_PORT": "8115",
            "COMPUTEMESH_ALLOW_OPEN": "true",
            "COMPUTEMESH_DRAIN_TIMEOUT_S": "1.5",
            "COMPUTEMESH_LOG_LEVEL": "DEBUG",
            "COMPUTEMESH_READY_FD": "7",
            "COMPUTEMESH_TOKEN": "12345",
            "HTTP_PORT": "1",
            "computemesh_instance": "no",
        },
    )
    assert config == ServiceConfig(
        http_host="::1",
        http_port=8115,
        allow_open=True,
        drain_timeout_s=1.5,
        log_level="DEBUG",
        ready_fd=7,
        token="12345",
    )


def test_the_environment_of_the_process_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the services do."""
    monkeypatch.setenv("COMPUTEMESH_INSTANCE", "blue")
    assert load(ServiceConfig).instance == "blue"


def test_names_of_other_systems_work_and_our_own_name_wins() -> None:
    """In the order in which they are declared."""
    assert load(ServiceConfig, {"NATS_URL": "nats://a"}).nats_url == "nats://a"
    assert load(ServiceConfig, {"NATS_URL": "nats://a", "COMPUTEMESH_NATS_URL": "nats://b"}).nats_url == "nats://b"
    retries = load(MarshallerConfig, {"WORK_RETRY_MAX": "1", "WORK_RETRY_DELAY": "0.5"})
    assert (retries.work_retry_max, retries.work_retry_delay) == (1, 0.5)
    assert load(MarshallerConfig, {"WORK_RETRY_MAX": "1", "COMPUTEMESH_WORK_RETRY_MAX": "2"}).work_retry_max == 2
    assert load(Sized, {"OLDER_SIZE": "1"}).size == 1
    assert load(Sized, {"OLDER_SIZE": "1", "OLD_SIZE": "2"}).size == 2


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    """Compose files pass on variables that nobody set as empty ones."""
    assert load(MarshallerConfig, {"COMPUTEMESH_WORK_RETRY_MAX": "", "WORK_RETRY_MAX": ""}).work_retry_max == 3
    assert load(MarshallerConfig, {"COMPUTEMESH_WORK_RETRY_MAX": "", "WORK_RETRY_MAX": "4"}).work_retry_max == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COMPUTEMESH_HTTP_PORT", "http"),
        ("COMPUTEMESH_HTTP_PORT", "65536"),
        ("COMPUTEMESH_HTTP_PORT", "-1"),
        ("COMPUTEMESH_ALLOW_OPEN", "perhaps"),
        ("COMPUTEMESH_LOG_LEVEL", "loud"),
        ("COMPUTEMESH_LOG_FORMAT", "xml"),
        ("COMPUTEMESH_DRAIN_TIMEOUT_S", "0"),
        ("COMPUTEMESH_DRAIN_TIMEOUT_S", "nan"),
        ("COMPUTEMESH_DRAIN_TIMEOUT_S", "inf"),
        ("COMPUTEMESH_REPLICAS", "6"),
        ("WORK_RETRY_MAX", "three"),
        ("WORK_RETRY_MAX", "-1"),
        ("WORK_RETRY_DELAY", "inf"),
        ("COMPUTEMESH_WORK_KEEP_S", "0"),
    ],
)
def test_a_value_that_does_not_fit_names_the_variable_and_the_value(name: str, value: str) -> None:
    """The one that was set, also when it is not our own name for the setting."""
    with pytest.raises(ConfigError) as caught:
        load(MarshallerConfig, {name: value})
    text = str(caught.value)
    assert text.startswith(f"{name}={value!r}: ")
    assert len(text.splitlines()) == 1


def test_a_node_id_must_be_given_and_be_one_token() -> None:
    """It becomes part of subjects; without one there is no node."""
    kinds: tuple[type[AgentConfig | DetectorConfig], ...] = (AgentConfig, DetectorConfig)
    for kind in kinds:
        assert load(kind, {"COMPUTEMESH_NODE_ID": "n1"}).node_id == "n1"
        with pytest.raises(ConfigError, match=r"COMPUTEMESH_NODE_ID='a\.b'"):
            load(kind, {"COMPUTEMESH_NODE_ID": "a.b"})
        with pytest.raises(ConfigError, match="COMPUTEMESH_NODE_ID"):
            load(kind, {})


def test_settings_that_contradict_each_other_are_refused_by_name() -> None:
    """Suspicion comes before loss."""
    config = load(RegistryConfig, {"COMPUTEMESH_SUSPECT_AFTER_S": "9", "COMPUTEMESH_LOST_AFTER_S": "9"})
    with pytest.raises(ConfigError, match=r"COMPUTEMESH_SUSPECT_AFTER_S=9 .*COMPUTEMESH_LOST_AFTER_S=9"):
        config.patience()


def test_labels_are_pairs_or_refused() -> None:
    """Blanks around them mean nothing."""
    assert AgentConfig(node_id="n", labels=" zone=a, disk = nvme ,").label_map() == {"zone": "a", "disk": "nvme"}
    assert AgentConfig(node_id="n").label_map() == {}
    for wrong in ("zone", "=a", "zone=a,disk"):
        with pytest.raises(ConfigError, match="COMPUTEMESH_LABELS"):
            AgentConfig(node_id="n", labels=wrong).label_map()


# --- the bus, as each role reaches it ------------------------------------------------------------------------


def test_without_an_address_there_is_no_external_server() -> None:
    """The embedded one is used."""
    assert nats_urls({}) == {}


def test_a_role_without_an_address_of_its_own_uses_the_common_one() -> None:
    """One address for all, or all but one."""
    assert nats_urls({"NATS_URL": "nats://h"}) == dict.fromkeys(Role, "nats://h")
    found = nats_urls({"NATS_URL": "nats://h", "COMPUTEMESH_NATS_URL_NODE": "nats://n"})
    assert (found[Role.NODE], found[Role.CLIENT]) == ("nats://n", "nats://h")


def test_a_role_without_any_address_is_named() -> None:
    """A mesh with half of its roles could not run."""
    with pytest.raises(ConfigError, match="COMPUTEMESH_NATS_URL_NODE is not set, and NATS_URL neither"):
        nats_urls({"COMPUTEMESH_NATS_URL_SERVICES": "nats://s"})


@pytest.mark.parametrize(
    ("url", "named", "node"),
    [
        ("nats://node-a:p@h", "", "a"),
        ("nats://node-a:p@h", "a", "a"),
        ("nats://client:p@h", "b", "b"),
        ("nats://h", "b", "b"),
        ("nats://h", "", ""),
    ],
)
def test_a_process_is_the_node_whose_user_it_has(url: str, named: str, node: str) -> None:
    """Else the one that it was told to be."""
    assert node_of(url, named) == node


def test_a_process_cannot_be_two_nodes() -> None:
    """The server would let it neither hear nor answer what is for the other."""
    with pytest.raises(ConfigError, match="COMPUTEMESH_NODE_ID is b, but the address of the bus has the user of a"):
        node_of("nats://node-a:p@h", "b")


def test_the_variables_of_a_worker_of_mloc_mean_the_same_here() -> None:
    """A worker's environment may be taken over as it is."""
    config = load(
        AgentConfig,
        {
            "WORKER_ID": "worker-001",
            "WORKER_TAGS": "fast, disk=nvme,",
            "TASK_TOPICS": "tasks.inference, tasks.ppo",
            "RESULTS_DIR": "./results",
            "HEARTBEAT_INTERVAL_SEC": "30",
            "VLLM_MODEL": "mistral",
            "PPO_MODEL": "gpt2",
            "LOG_LEVEL": "DEBUG",
        },
    )
    assert config.node_id == "worker-001"
    assert config.label_map() == {"fast": "true", "disk": "nvme"}
    assert config.topic_types() == frozenset({"inference", "ppo"})
    assert (config.results_dir, config.heartbeat_interval_s) == ("./results", 30.0)
    assert (config.default_model, config.ppo_model, config.log_level) == ("mistral", "gpt2", "DEBUG")


def test_no_topics_are_all_and_one_that_is_none_is_named() -> None:
    """An empty list would leave a node without work."""
    assert load(AgentConfig, {"WORKER_ID": "n1"}).topic_types() is None
    assert load(AgentConfig, {"WORKER_ID": "n1", "TASK_TOPICS": " , "}).topic_types() is None
    for topics in ("inference", "tasks.", "tasks.ppo,work.inference"):
        config = load(AgentConfig, {"WORKER_ID": "n1", "TASK_TOPICS": topics})
        with pytest.raises(ConfigError, match=f"^TASK_TOPICS='{topics}': write tasks.<work type>"):
            config.topic_types()


def test_a_label_counts_before_a_tag_of_the_same_name() -> None:
    """It says more."""
    config = load(AgentConfig, {"WORKER_ID": "n1", "WORKER_TAGS": "zone,fast", "COMPUTEMESH_LABELS": "zone=a"})
    assert config.label_map() == {"zone": "a", "fast": "true"}


def test_the_node_that_the_environment_names_may_be_called_a_worker() -> None:
    """Our own name for it wins."""
    assert told_node_id({}) == ""
    assert told_node_id({"WORKER_ID": "w"}) == "w"
    assert told_node_id({"COMPUTEMESH_NODE_ID": "", "WORKER_ID": "w"}) == "w"
    assert told_node_id({"COMPUTEMESH_NODE_ID": "n", "WORKER_ID": "w"}) == "n"


@pytest.mark.parametrize("level", ["INFO", "debug", "WARN", "warning", "Error", "CRITICAL"])
def test_log_levels_of_the_standard_library_are_taken(level: str) -> None:
    """In any case; logging can be set up with each."""
    assert load(ServiceConfig, {"LOG_LEVEL": level}).log_level.upper() in logging.getLevelNamesMapping()


@pytest.mark.parametrize(("told", "borne_s"), [("120", 120.0), ("", 20.0), ("soon", 20.0), ("-1", 20.0)])
def test_a_supervisor_gives_a_service_the_time_to_drain_that_it_was_told(told: str, borne_s: float) -> None:
    """One that cannot be read leaves the default: that service says by itself what is wrong with it."""
    assert supervisor.drain_timeout_s({"COMPUTEMESH_DRAIN_TIMEOUT_S": told}) == borne_s
