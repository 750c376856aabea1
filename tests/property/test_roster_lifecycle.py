"""Goal: whatever nodes, duplicates, clocks and registries do, no node is lost that was heard, and lives are told apart.

Method: a state machine over the pure roster. Two machines, each with agents that come and go, share one node id;
the registry hears what they say, in any order, and looks at the silence now and then.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from computemesh.contracts.nodes import NodeAnnouncement, NodeHeartbeat, NodeRecord, NodeState
from computemesh_services.node_registry import roster
from computemesh_services.node_registry.roster import Patience

PATIENCE = Patience(suspect_after_s=25, lost_after_s=45, unmonitored_ttl_s=1000)
MACHINES = ("a", "b")


class Roster(RuleBasedStateMachine):
    """One node id."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.record: NodeRecord | None = None
        self.heard_at = self.now
        """When a sign of life came that counts."""
        self.lives = 0
        self.sessions: dict[str, list[str]] = {machine: [] for machine in MACHINES}
        """Of every agent that was started on a machine and may still be running."""

    @initialize()
    def begin(self) -> None:
        self.start_an_agent("a")

    # --- what happens ----------------------------------------------------------------------------------------------

    @rule(machine=st.sampled_from(MACHINES))
    def start_an_agent(self, machine: str) -> None:
        """A restart, or a second one beside the first."""
        self.lives += 1
        self.sessions[machine].append(f"s{self.lives}")
        self.announce(machine, -1, slots=1)

    @rule(machine=st.sampled_from(MACHINES), which=st.integers(0, 5), slots=st.integers(1, 2))
    def announce(self, machine: str, which: int, slots: int) -> None:
        if not self.sessions[machine]:
            return
        session = self.sessions[machine][which % len(self.sessions[machine])]
        said = NodeAnnouncement(node_id="n1", session=session, machine_id=machine, slots=slots)
        before = self.record
        if roster.why_refused(before, said):
            assert before is not None
            assert before.monitored
            assert before.state is not NodeState.LOST
            assert before.session != session, "the agent that has the name is never refused"
            return
        self.moved(roster.announced(before, said, self.now))
        self.heard_at = self.now

    @precondition(lambda self: self.record is not None)
    @rule(machine=st.sampled_from(MACHINES), which=st.integers(0, 5))
    def beat(self, machine: str, which: int) -> None:
        if not self.sessions[machine]:
            return
        assert self.record is not None
        session = self.sessions[machine][which % len(self.sessions[machine])]
        beat = NodeHeartbeat(node_id="n1", session=session)
        after = roster.heard(self.record, beat, self.now)
        if roster.of_this_life(self.record, beat):
            self.heard_at = self.now
            assert (after.state, after.monitored) == (NodeState.ONLINE, True)
        else:
            assert after is self.record, "another agent's heartbeat changes nothing"
        self.moved(after)

    @rule(machine=st.sampled_from(MACHINES), which=st.integers(0, 5))
    def end_an_agent(self, machine: str, which: int) -> None:
        if self.sessions[machine]:
            self.sessions[machine].pop(which % len(self.sessions[machine]))

    @rule(seconds=st.sampled_from([0.1, 5.0, 20.0, 30.0, 50.0, 1500.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.record is not None)
    @rule()
    def look_at_the_silence(self) -> None:
        assert self.record is not None
        before, silent_s = self.record, self.now - self.heard_at
        after = roster.silent(before, silent_s, self.now, PATIENCE, seen_at=self.heard_at)
        if after.state is NodeState.LOST and before.state is not NodeState.LOST:
            assert silent_s >= (PATIENCE.lost_after_s if before.monitored else PATIENCE.unmonitored_ttl_s)
        if after.state is NodeState.SUSPECT and before.state is NodeState.ONLINE:
            assert before.monitored
            assert silent_s >= PATIENCE.suspect_after_s
        assert after.epoch == before.epoch
        self.moved(after)

    @precondition(lambda self: self.record is not None)
    @rule(reason=st.sampled_from(["", "fans"]), undrain=st.booleans())
    def drain(self, reason: str, undrain: bool) -> None:
        assert self.record is not None
        drained = roster.undrained(self.record, self.now) if undrain else roster.drained(self.record, reason, self.now)
        assert drained.drained is not undrain
        assert (drained.state, drained.epoch, drained.session) == (
            self.record.state, self.record.epoch, self.record.session,
        )  # fmt: skip
        self.record = drained

    # --- what must hold --------------------------------------------------------------------------------------------

    def moved(self, after: NodeRecord) -> None:
        before, self.record = self.record, after
        if before is None:
            assert after.epoch == 1
            return
        back = before.state is NodeState.LOST and after.state is not NodeState.LOST
        new_life = before.session != after.session
        assert after.epoch == before.epoch + (back or new_life), "an epoch is a life, and none is skipped"
        assert after.drained is before.drained
        if new_life:
            assert after.session not in before.retired or before.state is NodeState.LOST or not before.monitored
        if before.state is NodeState.LOST and after.state is not before.state:
            assert after.state is NodeState.ONLINE
        if before.state is NodeState.SUSPECT:
            assert after.state is not NodeState.SUSPECT or after == before or new_life

    @invariant()
    def the_present_session_is_not_retired(self) -> None:
        if self.record is not None:
            assert self.record.session not in self.record.retired
            assert len(self.record.retired) <= roster.RETIRED_MAX

    @invariant()
    def two_agents_that_go_on_talking_settle(self) -> None:
        """While the node is alive, nothing that any agent repeats changes whose name it is."""
        if self.record is None or not self.record.monitored or self.record.state is NodeState.LOST:
            return
        settled = self.record
        for _ in range(2):
            for machine, sessions in self.sessions.items():
                for session in sessions:
                    said = NodeAnnouncement(node_id="n1", session=session, machine_id=machine)
                    if not roster.why_refused(settled, said):
                        settled = roster.announced(settled, said, self.now)
                    settled = roster.heard(settled, NodeHeartbeat(node_id="n1", session=session), self.now)
        again = settled
        for machine, sessions in self.sessions.items():
            for session in sessions:
                said = NodeAnnouncement(node_id="n1", session=session, machine_id=machine)
                if not roster.why_refused(again, said):
                    again = roster.announced(again, said, self.now)
        if sum(map(len, self.sessions.values())) < roster.RETIRED_MAX:
            assert (again.session, again.epoch) == (settled.session, settled.epoch)


Roster.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestRoster = Roster.TestCase
