"""Which device serves a request, and what a device does next, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from computemesh_services.node_agent.engines.choice import (
    DeviceView,
    EngineView,
    Hold,
    Load,
    No,
    Run,
    Waiting,
    choose,
    next_move,
)

A_READY = EngineView(model="a", ready=True, slots=2)


def device(name: str, model: str = "", **more: object) -> DeviceView:
    return replace(DeviceView(id=name, model=model, ready=bool(model)), **more)  # type: ignore[arg-type]


def chosen(model: str, *devices: DeviceView, wish: str = "", size_mb: int | None = None) -> str:
    found = choose(model, devices, pending_max=2, wish=wish, size_mb=size_mb)
    return found.id if isinstance(found, DeviceView) else found.value


def line(*models: str, since_s: float = 0.0) -> list[Waiting]:
    return [Waiting(model=model, since_s=since_s) for model in models]


def move(engine: EngineView, waiting: list[Waiting], now_s: float = 0.0) -> Run | Load | Hold:
    return next_move(engine, waiting, now_s=now_s, patience_s=5.0)


class TestDevices:
    """The choice among devices."""

    def test_one_that_has_the_model_comes_before_one_with_more_memory(self) -> None:
        """A load costs more than a short wait."""
        assert chosen("a", device("0", free_mb=80_000), device("1", "a", free_mb=100, pending=1)) == "1"

    def test_of_those_that_have_the_model_the_least_busy_comes_first(self) -> None:
        """Work items keep an engine busy as requests do."""
        assert chosen("a", device("0", "a", pending=1), device("1", "a")) == "1"
        assert chosen("a", device("0", "a", works=1), device("1", "a")) == "1"

    def test_one_that_serves_comes_before_one_that_starts(self) -> None:
        """It answers at once."""
        assert chosen("a", device("0", "a", ready=False), device("1", "a", pending=1)) == "1"

    def test_a_full_one_gives_way_to_another_that_must_load(self) -> None:
        """The limit is a device's, not the model's."""
        assert chosen("a", device("0", "a", pending=2), device("1")) == "1"

    def test_of_the_empty_ones_that_with_most_free_memory_is_taken(self) -> None:
        """What is not known counts as none."""
        assert chosen("a", device("0"), device("1", free_mb=8000), device("2", free_mb=24_000)) == "2"

    def test_queue_pressure_comes_before_memory(self) -> None:
        """A device that must first finish for others is no quick one."""
        assert chosen("a", device("0", "b", pending=1, total_mb=80_000), device("1", "c", total_mb=8000)) == "1"

    def test_an_empty_one_comes_before_one_that_must_drop_its_model(self) -> None:
        """Models stay warm where they are."""
        assert chosen("a", device("0", "b", free_mb=60_000), device("1", free_mb=8000)) == "1"
        assert chosen("a", device("0", "b"), device("1")) == "1"

    def test_the_model_used_longest_ago_is_dropped(self) -> None:
        """Free memory is no reason there: how much there will be shows only afterwards."""
        assert chosen("a", device("0", "b", used_at=5, free_mb=9000), device("1", "c", used_at=4, free_mb=10)) == "1"

    def test_where_a_model_does_not_fit_it_is_loaded_last(self) -> None:
        """Into what is free, or into all there is where another model goes."""
        assert chosen("a", device("0", free_mb=8000), device("1", "b", pending=1, total_mb=24_000), size_mb=9000) == "1"
        assert chosen("a", device("0", free_mb=8000), size_mb=9000) == "0"
        occupied = device("0", "b", total_mb=24_000, free_mb=100)
        assert chosen("a", occupied, replace(occupied, id="1", pending=1, free_mb=20_000), size_mb=9000) == "0"

    def test_a_wish_is_granted_where_the_model_is_or_nothing_is(self) -> None:
        """Whoever wishes knows that its conversation was there."""
        assert chosen("a", device("0", "a"), device("1", "a", pending=1), wish="1") == "1"
        assert chosen("a", device("0", "a"), device("1"), wish="1") == "1"

    def test_a_wish_does_not_drop_a_model_for_one_that_is_elsewhere(self) -> None:
        """It is so only where nobody has the model."""
        assert chosen("a", device("0", "a"), device("1", "b"), wish="1") == "0"
        assert chosen("a", device("0"), device("1", "b"), wish="1") == "1"

    def test_a_wish_for_a_full_device_or_an_unknown_one_is_no_wish(self) -> None:
        """The node chooses."""
        assert chosen("a", device("0"), device("1", "a", pending=2), wish="1") == "0"
        assert chosen("a", device("0"), wish="7") == "0"

    def test_when_all_have_what_they_take_a_request_is_refused_and_a_work_item_is_not(self) -> None:
        """Work items wait."""
        full = [device("0", "a", pending=2), device("1", pending=3)]
        assert chosen("a", *full) == No.FULL
        found = choose("a", full, pending_max=None)
        assert isinstance(found, DeviceView)
        assert found.id == "0"

    def test_where_the_model_failed_it_is_not_tried_again(self) -> None:
        """Neither when the other devices are full; only where it failed everywhere that is the reason."""
        failed, full = device("0", barred=True), device("1", "a", pending=2)
        assert chosen("a", failed, device("1", "b", pending=1)) == "1"
        assert chosen("a", failed, full) == No.FULL
        assert chosen("a", failed) == No.BARRED


class TestMoves:
    """What a device does next."""

    def test_nobody_waits_and_nothing_happens(self) -> None:
        """Not even an unused engine ends: that is for the idle time."""
        assert move(A_READY, []) == Hold()
        assert move(EngineView(), []) == Hold()

    def test_an_empty_device_loads_what_the_first_one_needs(self) -> None:
        """Those behind wait."""
        assert move(EngineView(), line("b", "a")) == Load("b")

    def test_requests_begin_in_order_up_to_the_slots(self) -> None:
        """The engine has no line of its own."""
        assert move(A_READY, line("a", "a")) == Run(0)
        assert move(replace(A_READY, running=1), line("a")) == Run(0)
        assert move(replace(A_READY, running=2), line("a")) == Hold()

    def test_nobody_begins_before_the_engine_serves(self) -> None:
        """Not at its start, and not after a crash."""
        assert move(replace(A_READY, ready=False), line("a")) == Hold()

    def test_a_work_item_takes_no_slot(self) -> None:
        """It may pass requests that wait for one, and they it."""
        work = Waiting(model="a", since_s=0.0, work=True)
        assert move(replace(A_READY, running=2), [*line("a"), work]) == Run(1)
        assert move(replace(A_READY, works=9), line("a")) == Run(0)

    @pytest.mark.parametrize("busy", [{"running": 1}, {"works": 1}])
    def test_a_model_is_replaced_only_when_nothing_uses_it(self, busy: dict[str, int]) -> None:
        """Requests and work items alike."""
        assert move(replace(A_READY, **busy), line("b")) == Hold(draining=True)  # type: ignore[arg-type]
        assert move(A_READY, line("b")) == Load("b")

    def test_those_who_need_the_loaded_model_pass_one_who_needs_another_for_a_while(self) -> None:
        """From when that one came, or from when the model was loaded: whichever is later."""
        waiting = line("b", "a")
        assert move(A_READY, waiting, now_s=4.9) == Run(1)
        assert move(A_READY, waiting, now_s=5.0) == Load("b")
        assert move(replace(A_READY, running=1), waiting, now_s=5.0) == Hold(draining=True)
        assert move(replace(A_READY, since_s=3.0), waiting, now_s=7.9) == Run(1)
        assert move(replace(A_READY, since_s=3.0), waiting, now_s=8.0) == Load("b")

    def test_it_says_when_it_must_be_asked_again(self) -> None:
        """When patience ends while others of the loaded model wait for a slot."""
        assert move(replace(A_READY, running=2), line("b", "a"), now_s=1.0) == Hold(5.0)

    def test_a_start_that_nobody_waits_for_gives_way_after_a_while(self) -> None:
        """While somebody waits for it, it goes on."""
        starting = replace(A_READY, ready=False, since_s=1.0)
        assert move(starting, line("b"), now_s=5.9) == Hold(6.0)
        assert move(starting, line("b"), now_s=6.0) == Load("b")
        assert move(starting, line("a", "b"), now_s=60.0) == Hold()
