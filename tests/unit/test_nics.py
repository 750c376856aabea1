"""Which network interface is taken, from what the kernel says of them.

The tree has the shape of a machine with two processors: `mlx5_0` and a GPU are below one switch, `mlx5_1` is below
another one of the same processor, `mlx5_2` belongs to the other processor, `mlx5_3` is InfiniBand, and `rxe0` is
soft-RoCE, which is no PCI device.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from computemesh.peer.rdma import nics
from computemesh.peer.rdma.nics import Gid, Near, Nic, NicPort

GPU = ("0000:15:01.0", "0000:16:00.0", "0000:18:00.0")

V1, V2 = "IB/RoCE v1", "RoCE v2"
LINK_LOCAL = "fe80:0000:0000:0000:0a00:27ff:fe00:0001"
V4 = "0000:0000:0000:0000:0000:ffff:0a4d:0001"
V6 = "2001:0db8:0000:0000:0000:0000:0000:0001"
NONE = "0000:0000:0000:0000:0000:0000:0000:0000"


def add(
    sys: Path,
    name: str,
    *,
    pci: str = "",
    numa: int | None = None,
    state: str = "4: ACTIVE",
    layer: str = "Ethernet",
    rate: str = "100 Gb/sec (4X EDR)",
    gids: tuple[tuple[str, str], ...] = ((LINK_LOCAL, V1), (LINK_LOCAL, V2), (V4, V1), (V4, V2), (NONE, "")),
) -> None:
    device = sys / "devices" / (f"pci0000:15/{pci}" if pci else "virtual")
    folder = device / "infiniband" / name
    port = folder / "ports/1"
    for part in ("gids", "gid_attrs/types", "gid_attrs/ndevs"):
        (port / part).mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "link_layer").write_text(f"{layer}\n")
    (port / "rate").write_text(f"{rate}\n")
    for index, (address, kind) in enumerate(gids):
        (port / "gids" / str(index)).write_text(f"{address}\n")
        if kind:
            (port / "gid_attrs/types" / str(index)).write_text(f"{kind}\n")
            (port / "gid_attrs/ndevs" / str(index)).write_text("eth0\n")
    if pci:
        (folder / "device").symlink_to(device)
    if numa is not None:
        (device / "numa_node").write_text(f"{numa}\n")
    (sys / "class/infiniband").mkdir(parents=True, exist_ok=True)
    (sys / "class/infiniband" / name).symlink_to(folder)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    add(tmp_path, "mlx5_0", pci="0000:15:01.0/0000:16:00.0/0000:17:00.0", numa=0)
    add(tmp_path, "mlx5_1", pci="0000:15:02.0/0000:26:00.0/0000:27:00.0", numa=0, rate="400 Gb/sec (4X NDR)")
    add(tmp_path, "mlx5_2", pci="0000:15:03.0/0000:36:00.0/0000:37:00.0", numa=1, rate="400 Gb/sec (4X NDR)")
    add(tmp_path, "mlx5_3", pci="0000:15:04.0/0000:47:00.0", numa=1, layer="InfiniBand", gids=((LINK_LOCAL, V1),))
    add(tmp_path, "mlx5_4", pci="0000:15:05.0/0000:57:00.0", numa=0, state="1: DOWN", rate="800 Gb/sec (4X XDR)")
    add(tmp_path, "rxe0", rate="2.5 Gb/sec (1X SDR)")
    for node, processors in ((0, "0-3,8"), (1, "4-7,9")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{processors}\n")
    return tmp_path


def names(found: list[Nic]) -> list[str]:
    return [nic.name for nic in found]


def test_what_the_kernel_says_is_read(machine: Path) -> None:
    first = nics.read(machine)[0]
    assert first.name == "mlx5_0"
    assert first.numa_node == 0
    assert first.pci_bus_id == "0000:17:00.0"
    assert first.pci_path == ("0000:15:01.0", "0000:16:00.0", "0000:17:00.0")
    (port,) = first.ports
    assert (port.number, port.state, port.link_type, port.gbps) == (1, "ACTIVE", "RoCE", 100.0)
    assert [(gid.index, gid.kind, gid.interface) for gid in port.gids] == [
        (0, V1, "eth0"),
        (1, V2, "eth0"),
        (2, V1, "eth0"),
        (3, V2, "eth0"),
    ]


def test_an_interface_that_is_no_pci_device_has_no_place(machine: Path) -> None:
    soft = nics.read(machine)[-1]
    assert (soft.name, soft.numa_node, soft.pci_bus_id) == ("rxe0", -1, "")


def test_a_machine_without_interfaces_has_none(tmp_path: Path) -> None:
    assert nics.read(tmp_path) == []


@pytest.mark.parametrize(
    ("near", "order"),
    [
        (Near(), ["mlx5_1", "mlx5_2", "mlx5_0", "mlx5_3", "rxe0", "mlx5_4"]),  # the fastest
        (Near(numa_node=0), ["mlx5_1", "mlx5_0", "rxe0", "mlx5_2", "mlx5_3", "mlx5_4"]),
        (Near(numa_node=1), ["mlx5_2", "mlx5_3", "rxe0", "mlx5_1", "mlx5_0", "mlx5_4"]),
        (Near(0, GPU), ["mlx5_0", "mlx5_1", "rxe0", "mlx5_2", "mlx5_3", "mlx5_4"]),
    ],
)
def test_the_nearest_is_first_then_the_fastest_and_what_is_down_is_last(
    machine: Path, near: Near, order: list[str]
) -> None:
    assert names(nics.rank(nics.read(machine), near)) == order


def test_the_preferred_one_is_first_wherever_it_is(machine: Path) -> None:
    assert names(nics.rank(nics.read(machine), Near(numa_node=0), "mlx5_3"))[0] == "mlx5_3"


def test_distance_counts_bridges_and_the_way_between_processors_above_all(machine: Path) -> None:
    far = {nic.name: nics.distance(nic, Near(0, GPU)) for nic in nics.read(machine)}
    assert far["mlx5_0"] == (0, 2)
    assert far["mlx5_1"] == (0, 100)
    assert far["mlx5_2"] == (1, 100)


def test_the_first_that_will_do_is_taken(machine: Path) -> None:
    ranked = nics.rank(nics.read(machine), Near(numa_node=0))
    assert nics.choose(ranked, device=None, port=1)[0].name == "mlx5_1"
    assert nics.choose(ranked, device="mlx5_2", port=1)[0].name == "mlx5_2"
    assert nics.choose(ranked, device=None, port=1, link_type="InfiniBand")[0].name == "mlx5_3"
    assert nics.choose(ranked, device=None, port=1, min_gbps=400)[0].name == "mlx5_1"


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"device": "mlx5_9", "port": 1}, "there is no network interface 'mlx5_9'"),
        ({"device": "mlx5_4", "port": 1}, "port 1 of mlx5_4 is DOWN"),
        ({"device": "mlx5_0", "port": 2}, "mlx5_0 has no port 2"),
        ({"device": "mlx5_0", "port": 1, "min_gbps": 400.0}, "mlx5_0 has 100 Gbit/s, 400 are wanted"),
        ({"device": "mlx5_0", "port": 1, "link_type": "InfiniBand"}, "mlx5_0 is RoCE, the peer's is InfiniBand"),
    ],
)
def test_why_none_will_do_is_said(machine: Path, wanted: dict[str, object], why: str) -> None:
    with pytest.raises(LookupError, match=why):
        nics.choose(nics.read(machine), **wanted)  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="no network interface with RDMA"):
        nics.choose([], device=None, port=1)


@pytest.mark.parametrize(
    ("gids", "index"),
    [
        ([(LINK_LOCAL, V1), (LINK_LOCAL, V2), (V4, V1), (V4, V2)], 3),
        ([(LINK_LOCAL, V1), (LINK_LOCAL, V2), (V6, V2)], 2),
        ([(LINK_LOCAL, V2), (V4, V2)], 1),
        ([(LINK_LOCAL, V2)], 0),
        ([(V4, V1)], 0),
    ],
)
def test_the_address_is_one_that_routers_pass_on(gids: list[tuple[str, str]], index: int) -> None:
    listed = tuple(Gid(number, address, kind, "eth0") for number, (address, kind) in enumerate(gids))
    found = nics.best_gid(NicPort(1, "ACTIVE", "RoCE", 100.0, listed))
    assert found is not None
    assert found.index == index
    assert nics.best_gid(NicPort(1, "ACTIVE", "RoCE", 100.0, ())) is None


@pytest.mark.parametrize(
    ("said", "gbps"), [("100Gbps", 100.0), ("100 Gb/s", 100.0), ("400G", 400.0), ("25", 25.0), ("1.6Tbit/s", 1600.0)]
)
def test_a_bandwidth_is_understood_as_people_write_it(said: str, gbps: float) -> None:
    assert nics.gbps(said) == gbps


@pytest.mark.parametrize("said", ["", "fast", "-1G", "10 GB/s", "1e9"])
def test_what_is_no_bandwidth_is_refused(said: str) -> None:
    with pytest.raises(ValueError, match="min_bw"):
        nics.gbps(said)


@pytest.mark.parametrize(("processors", "node"), [([0, 1], 0), ([9], 1), ([3, 4], -1), ([], -1), (list(range(10)), -1)])
def test_a_process_that_is_bound_to_a_node_is_near_it(machine: Path, processors: list[int], node: int) -> None:
    assert nics.here(machine, processors).numa_node == node


def test_an_interface_is_told_in_the_shape_of_resource_records(machine: Path) -> None:
    first = nics.describe(nics.read(machine)[0], lambda name, port: 4096)
    assert first == {
        "name": "mlx5_0",
        "health": "AVAILABLE",
        "numa_node": 0,
        "pci_bus_id": "0000:17:00.0",
        "ports": [{"port": 1, "state": "ACTIVE", "link_type": "RoCE", "active_mtu": 4096, "gbps": 100.0}],
    }
    assert nics.describe(nics.read(machine)[4], lambda name, port: 0)["health"] == "UNAVAILABLE"
