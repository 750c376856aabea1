"""Goal: the engines of a node serve everybody, in order, within their limits, whatever comes.

Method: devices are played in virtual time with the real decisions: requests and work items come and go, engines start,
crash and fail to start. After each step the limits are checked, and at the end everybody must have been served.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from computemesh_services.node_agent.engines.choice import (
    DeviceView,
    EngineView,
    Hold,
    Load,
    Run,
    Waiting,
    choose,
    next_move,
)

PATIENCE_S = 5.0
START_S = 2.0
MODELS = ("a", "b", "c")

devices = st.lists(
    st.builds(
        DeviceView,
        id=st.sampled_from(["0", "1", "2", "3"]),
        model=st.sampled_from(["", *MODELS]),
        ready=st.booleans(),
        pending=st.integers(0, 4),
        works=st.integers(0, 2),
        total_mb=st.none() | st.integers(0, 80_000),
        free_mb=st.none() | st.integers(0, 80_000),
        used_at=st.integers(0, 9),
        barred=st.booleans(),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one.id,
)


@given(devices, st.sampled_from(MODELS), st.none() | st.integers(1, 4), st.sampled_from(["", "0", "1"]))
def test_a_request_is_refused_exactly_when_no_device_can_take_it(
    there: list[DeviceView], model: str, pending_max: int | None, wish: str
) -> None:
    """And who takes it has room and has not just failed; one with the model is passed over only for one that was wished
    for."""
    able = [one for one in there if not one.barred and (pending_max is None or one.pending < pending_max)]
    found = choose(model, there, pending_max=pending_max, wish=wish)
    assert isinstance(found, DeviceView) is bool(able)
    if isinstance(found, DeviceView):
        assert found in able
        have_it = [one for one in able if one.model == model]
        if have_it and found not in have_it:
            assert (found.id, found.model) == (wish, "")


@given(devices, st.sampled_from(MODELS), st.integers(0, 90_000))
def test_the_choice_does_not_depend_on_the_order_of_devices_that_differ(
    there: list[DeviceView], model: str, size_mb: int
) -> None:
    """But for those that are alike in all that counts."""
    one = choose(model, there, pending_max=2, size_mb=size_mb)
    other = choose(model, there[::-1], pending_max=2, size_mb=size_mb)
    if isinstance(one, DeviceView) and isinstance(other, DeviceView):
        assert (one.model == model, one.model == "", one.pending + one.works) == (
            other.model == model,
            other.model == "",
            other.pending + other.works,
        )
    else:
        assert one == other


@dataclass
class Played:
    """A device, played."""

    slots: int
    now_s: float = 0.0
    model: str = ""
    ready_at_s: float = 0.0
    since_s: float = 0.0
    line: list[tuple[int, Waiting]] = field(default_factory=list[tuple[int, Waiting]])
    running: list[tuple[float, bool]] = field(default_factory=list[tuple[float, bool]])
    """When each ends, and whether it is a work item."""
    begun: list[int] = field(default_factory=list[int])
    latest_s: dict[int, float] = field(default_factory=dict[int, float])
    """How long each waited."""
    loads: int = 0

    @property
    def ready(self) -> bool:
        return bool(self.model) and self.now_s >= self.ready_at_s

    def view(self) -> EngineView:
        works = sum(work for _, work in self.running)
        return EngineView(
            model=self.model,
            ready=self.ready,
            since_s=self.ready_at_s if self.ready else self.since_s,
            running=len(self.running) - works,
            works=works,
            slots=self.slots,
        )

    def advance(self, lasts_s: float) -> float | None:
        """Does all that is to be done now; when it must be asked again."""
        while True:
            view = self.view()
            match next_move(view, [one for _, one in self.line], now_s=self.now_s, patience_s=PATIENCE_S):
                case Run(index):
                    name, one = self.line[index]
                    assert self.ready, "nobody begins before the engine serves"
                    assert one.model == self.model, "nobody begins on another model's engine"
                    assert one.work or view.running < self.slots, "no more at a time than there are slots"
                    ahead = [other for _, other in self.line[:index]]
                    assert one.work or not any(other.model == one.model and not other.work for other in ahead), (
                        "requests for one model begin in order"
                    )
                    del self.line[index]
                    self.begun.append(name)
                    self.latest_s[name] = self.now_s - one.since_s
                    self.running.append((self.now_s + lasts_s, one.work))
                case Load(model):
                    assert not self.running, "a model is replaced only when nothing uses it"
                    assert model == self.line[0][1].model, "whoever came first decides"
                    assert model != self.model
                    self.model, self.since_s, self.ready_at_s = model, self.now_s, self.now_s + START_S
                    self.loads += 1
                case Hold(until_s):
                    assert until_s is None or until_s > self.now_s
                    return until_s

    def next_event_s(self, until_s: float | None) -> float | None:
        times = [until for until, _ in self.running]
        if self.model and not self.ready:
            times.append(self.ready_at_s)
        if until_s is not None:
            times.append(until_s)
        return min(times, default=None)

    def step_to(self, when_s: float) -> None:
        self.now_s = when_s
        self.running = [one for one in self.running if one[0] > when_s]


arrivals = st.lists(
    st.tuples(st.floats(0, 3), st.sampled_from(MODELS), st.booleans(), st.floats(0.1, 8)), min_size=1, max_size=40
)


@given(arrivals, st.integers(1, 4), st.sets(st.integers(0, 60), max_size=4))
def test_everybody_is_served_in_order_and_in_time(
    come: list[tuple[float, str, bool, float]], slots: int, crashes: set[int]
) -> None:
    """Nobody waits longer than those ahead, and the models that are loaded between, can take."""
    at = Played(slots=slots)
    lasts_max_s = max(lasts_s for *_, lasts_s in come)
    events = 0
    todo = [*enumerate(come)]
    due_s = 0.0
    lasts_s = 1.0
    while True:
        until_s = at.advance(lasts_s)
        event_s = at.next_event_s(until_s)
        if todo:
            name, (gap_s, model, work, lasts_s) = todo[0]
            if event_s is None or due_s + gap_s <= event_s:
                todo.pop(0)
                due_s += gap_s
                at.step_to(max(at.now_s, due_s))
                at.line.append((name, Waiting(model=model, since_s=at.now_s, work=work)))
                continue
        if event_s is None:
            break
        at.step_to(event_s)
        events += 1
        if events in crashes and at.ready:  # It is back after its start; what ran is lost.
            at.running = []
            at.ready_at_s = at.now_s + START_S
    assert not at.line, "nobody waits for ever"
    assert sorted(at.begun) == list(range(len(come)))
    # Each who waits is delayed by those ahead of it and those who passed it, a load and the patience for each.
    bound_s = (len(come) + len(crashes)) * (lasts_max_s + START_S + PATIENCE_S)
    assert max(at.latest_s.values()) <= bound_s


def test_two_models_that_are_always_asked_for_share_a_device() -> None:
    """Each load serves for as long as the patience, so that loads do not eat up the time."""
    at = Played(slots=1)
    at.line = [(name, Waiting(model="ab"[name % 2], since_s=0.0)) for name in range(200)]
    while (event_s := at.next_event_s(at.advance(0.5))) is not None:
        at.step_to(event_s)
    assert len(at.begun) == 200
    assert 100 / (PATIENCE_S + 2 * 0.5) <= at.loads <= 1 + 100 / PATIENCE_S
