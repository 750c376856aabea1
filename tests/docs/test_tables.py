"""The tables that people keep by hand have a row for everything the code has: services, settings, interfaces."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any, Final, get_args, get_origin, get_type_hints

import msgspec
import pytest

import computemesh
from computemesh.cli.services import SERVICES
from computemesh.config import PREFIX, ServiceConfig
from computemesh.hardware import Gpu, Tier, tier_of
from computemesh_services.resource_detector.probes.choice import Name
from computemesh_services.resource_detector.probes.scripted import Fault, Hardware

ROOT: Final = Path(__file__).parents[2]

OF_THE_COMMAND_LINE: Final = frozenset({"COMPUTEMESH_CONFIG", "COMPUTEMESH_HOME", "COMPUTEMESH_NATS_URL_SERVICES"})
GIVEN_BY_THE_SUPERVISOR: Final = frozenset({"ready_fd"})


def row(page: str, first: str) -> list[str]:
    """The cells of the one table row of a page that begins with *first*."""
    rows = [line for line in (ROOT / page).read_text().splitlines() if re.match(rf"\| \[?{re.escape(first)}\W", line)]
    assert len(rows) == 1, f"{page}: {len(rows)} rows begin with {first}"
    return [cell.strip() for cell in rows[0].strip("|").split("|")]


def configs() -> list[type[ServiceConfig]]:
    """The configuration of every service that ``computemesh up`` starts."""
    found: list[type[ServiceConfig]] = []
    for spec in SERVICES:
        module = importlib.import_module(f"{spec.module}.config")
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, ServiceConfig) and value.__module__ == module.__name__
        ]
    return [ServiceConfig, *found]


def names(kind: type[Any], field: msgspec.structs.FieldInfo) -> list[str]:
    """The variables a field is read from."""
    hint = get_type_hints(kind, include_extras=True)[field.name]
    metas = get_args(hint)[1:] if get_origin(hint) is not None else ()
    others = [name for meta in metas if isinstance(meta, msgspec.Meta) for name in (meta.extra or {}).get("env", [])]
    return [PREFIX + field.name.upper(), *others]


@pytest.mark.parametrize("spec", SERVICES, ids=lambda spec: spec.name)
def test_a_service_is_in_the_table_of_services_with_its_port(spec: Any) -> None:
    """``services/README.md`` links to the card of each."""
    cells = row("services/README.md", spec.name)
    assert cells[0] == f"[{spec.name}]({spec.module.replace('.', '/')}/__init__.py)"
    assert cells[2] == str(spec.port)


@pytest.mark.parametrize("kind", configs(), ids=lambda kind: kind.__name__)
def test_every_setting_is_in_the_table_of_settings(kind: type[ServiceConfig]) -> None:
    """Under one of its names, with its default where that is a number."""
    for field in msgspec.structs.fields(kind):
        inherited = kind is not ServiceConfig and field.name in ServiceConfig.__struct_fields__
        if inherited or field.name in GIVEN_BY_THE_SUPERVISOR:
            continue
        page = (ROOT / "docs" / "configuration.md").read_text()
        shown = [name for name in names(kind, field) if f"| `{name}` |" in page]
        assert shown, f"docs/configuration.md has no row for {' or '.join(names(kind, field))}"
        if type(field.default) in (int, float) and field.default:
            rows = [line for line in page.splitlines() if line.startswith(f"| `{shown[0]}` |")]
            defaults = {line.split("|")[2].strip() for line in rows}
            assert defaults & {f"{field.default:g}", str(field.default)}, f"{shown[0]}: {defaults}, {field.default}"


def test_no_setting_is_described_that_there_is_not() -> None:
    """A renamed setting would silently do nothing for whoever set it."""
    described = set(re.findall(rf"{PREFIX}[A-Z_]+", (ROOT / "docs" / "configuration.md").read_text()))
    known = {name for kind in configs() for field in msgspec.structs.fields(kind) for name in names(kind, field)}
    assert described - known == OF_THE_COMMAND_LINE


def test_every_module_of_the_sdk_is_in_the_table_of_the_sdk() -> None:
    """``shared/README.md`` says of each what it is."""
    listed = re.findall(r"(?m)^\| (`.*?`) \|", (ROOT / "shared" / "README.md").read_text())
    found = {module.name for module in pkgutil.iter_modules(computemesh.__path__)}
    assert {name for cell in listed for name in re.findall(r"`(\w+)`", cell)} == found


def test_the_public_interface_is_what_its_page_says() -> None:
    """Every name of ``docs/api.md`` can be imported from its module, and stands in ``__all__`` where there is one."""
    rows = re.findall(r"(?m)^\| (`computemesh\..*?`) \| .*? \| (.*?) \|$", (ROOT / "docs" / "api.md").read_text())
    assert len(rows) > 5
    for modules, names in rows:
        first, *others = re.findall(r"`(.*?)`", modules)
        package = first.rpartition(".")[0]
        for name in (first, *(package + other for other in others)):
            module = importlib.import_module(name)
            public = set(re.findall(r"`(\w+)`", names))
            assert public or names == "all"
            assert not {one for one in public if not hasattr(module, one)}, name
            assert public <= set(getattr(module, "__all__", public)), name


def test_every_known_card_lands_in_the_tier_that_its_page_says() -> None:
    """``docs/hardware.md``, with the nominal memory and with what drivers report of it; no name plays a part."""
    page = (ROOT / "docs" / "hardware.md").read_text()
    cards = re.findall(r"(?m)^\| ((?:NVIDIA|AMD) .*?) \| (\d+) \| (\S+) \| `(\w+)` \| (\S.*?) \|$", page)
    assert len(cards) == len(re.findall(r"(?m)^\| (?:NVIDIA|AMD) ", page)) >= 30
    for name, vram_gb, told, tier, _ in cards:
        kind = {"architecture": told} if told.startswith("gfx") else {"compute_capability": told}
        for vram_mb in (int(vram_gb) * 1024, int(int(vram_gb) * 1024 * 0.95)):
            assert tier_of([Gpu(vram_total_mb=vram_mb, **kind)]) is Tier(tier), (name, vram_mb)


def test_tiers_providers_and_the_fields_of_scripted_hardware_are_on_the_page() -> None:
    """``docs/hardware.md``"""
    page = (ROOT / "docs" / "hardware.md").read_text()
    for word in (*Tier, *get_args(Name)):
        assert f"\n| `{word}` |" in page
    for name in (*Hardware.__struct_fields__, *Fault.__struct_fields__):
        assert f"`{name}`" in page or f'"{name}"' in page, name
