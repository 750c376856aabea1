"""Items whose replicas start together: all of them get a place at once, or none does. Pure.

Two such items can never each hold half of what the other needs, since nothing is held before all is found.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import msgspec

from computemesh.contracts.work import WorkRecord
from computemesh_services.work_marshaller import placement
from computemesh_services.work_marshaller.placement import Candidate


def choose(record: WorkRecord, candidates: Iterable[Candidate]) -> list[str]:
    """A node for each replica, by their order; empty when they do not all fit now.

    One after the other gets the best place that is left. Replicas are all alike, so this finds places if there are any.
    """
    fit = [
        (-placement.score(record, candidate), candidate.node.node_id, candidate)
        for candidate in candidates
        if next(placement.refusals(record, candidate), None) is None
    ]
    heapq.heapify(fit)
    chosen: list[str] = []
    while fit and len(chosen) < record.replicas:
        _, node_id, candidate = heapq.heappop(fit)
        chosen.append(node_id)
        fuller = msgspec.structs.replace(candidate, taken=candidate.taken + 1)
        if not record.requirements.spread and next(placement.refusals(record, fuller), None) is None:
            heapq.heappush(fit, (-placement.score(record, fuller), node_id, fuller))
    return chosen if len(chosen) == record.replicas else []
