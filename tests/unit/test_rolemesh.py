"""Goal: what RoleMesh's node agents post is read where it can be, and never brings anything down.

Method: bodies of several shapes, since theirs is written down nowhere; then anything that is JSON.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from computemesh.contracts.base import Refused, decode, encode
from computemesh.contracts.nodes import NodeAnnouncement, NodeHeartbeat
from computemesh.hardware import Gpu, GpuUse
from computemesh.testing.builders import a_node
from computemesh_services.node_registry import rolemesh

CARD = {"name": "P40", "memory_total_mb": 24_000, "memory_used_mb": 5_000}


@pytest.mark.parametrize(
    "said",
    [
        {"devices": [CARD]},
        {"gpus": [CARD]},
        {"metrics": [CARD]},
        {"metrics": {"devices": [CARD]}},
        {"metrics": {"gpus": [CARD]}},
        {"metrics": {"gpu:0": CARD}},
        {"devices": {"gpu:0": CARD}},
    ],
)
def test_devices_are_found_wherever_they_stand(said: dict[str, Any]) -> None:
    """As a list or by their ids, at the top or among the metrics."""
    assert rolemesh.devices(said) == [
        (Gpu(index=0, name="P40", vram_total_mb=24_000), GpuUse(index=0, vram_used_mb=5_000))
    ]


@pytest.mark.parametrize(
    ("device", "total", "used"),
    [
        ({"vram_total_mb": 8, "vram_used_mb": 3}, 8, 3),
        ({"total_vram_mb": 8, "used_vram_mb": 3}, 8, 3),
        ({"mem_total_mib": 8, "mem_free_mib": 5}, 8, 3),
        ({"memory_total_bytes": 8 * 1024**2, "memory_free_bytes": 5 * 1024**2}, 8, 3),
        ({"vram_total_gb": 1, "vram_used_gb": 0.5}, 1024, 512),
        ({"vram_total_mb": 8}, 8, 0),
        ({"vram_total_mb": 8, "vram_used_mb": 99}, 8, 8),
        ({"vram_total_mb": 8, "vram_used_mb": -1}, 8, 0),
    ],
)
def test_sizes_are_read_in_any_unit(device: dict[str, Any], total: int, used: int) -> None:
    """What is used may be told as what is free, and is never more than there is."""
    ((gpu, use),) = rolemesh.devices({"devices": [device]})
    assert (gpu.vram_total_mb, use.vram_used_mb) == (total, used)


@pytest.mark.parametrize(
    "device",
    [
        {}, {"name": "no size"}, {"device_id": "cpu", "memory_total_mb": 9}, {"vram_total_mb": -1},
        {"vram_total_mb": float("nan")}, {"vram_total_mb": 1e30}, {"vram_total_mb": True}, {"vram_total_mb": "8"},
        {"disk_total_mb": 9}, {"total_mb": 9}, "gpu", None,
    ],
)  # fmt: skip
def test_what_is_no_gpu_with_a_size_is_left_out(device: Any) -> None:
    """Rather than guessed."""
    assert rolemesh.devices({"devices": [device]}) == []


def test_devices_keep_the_numbers_they_have() -> None:
    """By index, by the end of the id, or by place."""
    listed = [{"vram_total_mb": 1, **more} for more in ({"index": 4}, {"id": "cuda:2"}, {"device_id": "a"})]
    assert [gpu.index for gpu, _ in rolemesh.devices({"devices": listed})] == [4, 2, 2]


def test_a_registration_is_an_announcement_of_a_host_that_takes_no_work() -> None:
    """What is short becomes labels; GPUs in it are taken over."""
    said = rolemesh.Register(
        node_id="n1",
        base_url="https://box.example:8091/x",
        roles=["chat"],
        meta={"zone": "a", "n": 3, "on": True, "long": "x" * 201, "list": [1], "devices": [CARD]},
    )
    announced = rolemesh.announcement(said)
    assert isinstance(announced, NodeAnnouncement)
    assert (announced.slots, announced.hostname, announced.roles) == (0, "box.example", ["chat"])
    assert announced.labels == {"zone": "a", "n": "3", "on": "true"}
    assert announced.gpus == [Gpu(name="P40", vram_total_mb=24_000)]


@pytest.mark.parametrize("url", ["", "box:8091", "ftp://box", "http://", "http://[x", "http:///x", "data:,x"])
def test_an_address_that_is_none_is_refused_by_name(url: str) -> None:
    """Nobody could reach the node there."""
    answer = rolemesh.announcement(rolemesh.Register(node_id="n1", base_url=url))
    assert isinstance(answer, Refused)
    assert answer.field == "base_url"


def test_a_heartbeat_announces_gpus_that_are_new_and_only_of_such_a_host() -> None:
    """Not again when they are known, and never over what a node of ours announced."""
    found = rolemesh.devices({"devices": [CARD]})
    host = a_node("n1", base_url="http://box", slots=0, drained=True)
    news = rolemesh.reannouncement(host, found)
    assert news is not None
    assert (news.gpus, news.base_url, news.slots) == ([gpu for gpu, _ in found], "http://box", 0)
    assert rolemesh.reannouncement(a_node("n1", base_url="http://box", gpus=news.gpus), found) is None
    assert rolemesh.reannouncement(a_node("n1"), found) is None
    assert rolemesh.reannouncement(host, []) is None


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["devices", "gpus", "metrics", "vram_total_mb", "memory_used_mb", "index", "name", "id", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(metrics=json, devices=json, gpus=json, models=json)
def test_whatever_a_heartbeat_holds_it_becomes_a_valid_one(metrics: Any, devices: Any, gpus: Any, models: Any) -> None:
    """Or the other services would refuse to read it."""
    said = rolemesh.Heartbeat(node_id="n1", metrics=metrics, devices=devices, gpus=gpus, loaded_models=models)
    found = rolemesh.devices_of(said)
    beat = rolemesh.heartbeat(said, found)
    assert decode(encode(beat), NodeHeartbeat) == beat
    news = rolemesh.reannouncement(a_node("n1", base_url="http://box"), found)
    assert news is None or decode(encode(news), NodeAnnouncement) == news


@given(meta=st.dictionaries(st.text(max_size=5), json, max_size=5))
def test_whatever_a_registration_holds_it_becomes_a_valid_announcement(meta: dict[str, Any]) -> None:
    """The same for what is stored."""
    announced = rolemesh.announcement(rolemesh.Register(node_id="n1", base_url="http://box", meta=meta))
    assert isinstance(announced, NodeAnnouncement)
    assert decode(encode(announced), NodeAnnouncement) == announced


@pytest.mark.parametrize(
    ("record", "session", "known"),
    [
        (None, "s-1", False),
        (a_node(session=""), "s-1", False),
        (a_node(session="s-1"), "", False),
        (a_node(session="s-1"), None, False),
        (a_node(session="s-1"), "s-1", True),
        (a_node(session="s-1"), "s-2", True),
    ],
)
def test_what_an_agent_of_ours_posts_counts_only_where_it_is_not_on_the_bus(
    record: Any, session: Any, known: bool
) -> None:
    """RoleMesh's own agents tell no session; their hosts may take the place of a node that is gone."""
    assert rolemesh.on_the_bus(record, session) is known
