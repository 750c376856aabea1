"""What each role may say and hear on the bus."""

from __future__ import annotations

import pytest

from computemesh.contracts import work
from computemesh.contracts.base import Role
from computemesh.contracts.catalog import events, requests
from computemesh.contracts.permissions import inbox_prefix, is_inbox, permissions

ROLES = list(Role)
OUTSIDERS = [role for role in ROLES if role is not Role.SERVICES]


def _covers(allowed: str, subject: str) -> bool:
    """Whether *allowed* admits some subject that *subject* stands for."""
    ours, theirs = allowed.split("."), subject.split(".")
    for index, token in enumerate(ours):
        if token == ">":
            return len(theirs) > index
        if index >= len(theirs) or ("*" not in (token, theirs[index]) and token != theirs[index]):
            return False
    return len(ours) == len(theirs)


def _may(allowed: tuple[str, ...], subject: str) -> bool:
    return any(_covers(one, subject) for one in allowed)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_publishes_exactly_the_events_it_sends(role: Role) -> None:
    """An event goes out from its senders and from nobody else, unless it shares a subject with a request."""
    asked = {request.subject for request in requests() if role in request.asked_by and not request.target}
    for event in events():
        subject = event.at("x" if event.target else "")
        assert _may(permissions(role).publish, subject) == (role in event.sent_by or subject in asked)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_publishes_exactly_the_requests_it_asks(role: Role) -> None:
    """A question comes from those who may ask it."""
    for request in requests():
        subject = request.at("x" if request.target else "")
        assert _may(permissions(role).publish, subject) == (role in request.asked_by)


@pytest.mark.parametrize("role", ROLES)
def test_only_the_role_that_answers_a_request_hears_it(role: Role) -> None:
    """A question is nobody else's business."""
    for request in requests():
        subject = request.at("x" if request.target else "")
        assert _may(permissions(role).subscribe, subject) == (role is request.answered_by)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_hears_the_events_it_reads(role: Role) -> None:
    """Readers of an event may subscribe to all of its targets at once."""
    for event in events():
        assert (event.at("*" if event.target else "") in permissions(role).subscribe) == (role in event.read_by)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_hears_no_inbox_but_its_own(role: Role) -> None:
    """With another's inbox it could read replies that are not meant for it."""
    for other in ROLES:
        assert _may(permissions(role).subscribe, f"{inbox_prefix(other)}.x") == (role is other)


@pytest.mark.parametrize("role", OUTSIDERS)
def test_outside_the_services_nobody_reaches_the_store_or_an_inbox(role: Role) -> None:
    """JetStream and the records belong to the services; others reply by leave to respond."""
    forbidden = ["$JS.API.INFO", "$JS.ACK.x", "$JS.FC.x", "$KV.compute-work.x", "$O.x.C.y", "_R_.x", "$SYS.x"]
    for subject in [*forbidden, *(f"{inbox_prefix(other)}.x" for other in ROLES)]:
        assert not _may(permissions(role).publish, subject)


def test_services_reach_the_store_and_every_inbox() -> None:
    """They answer everyone, and own what is kept."""
    publish = permissions(Role.SERVICES).publish
    for subject in ("$JS.API.INFO", "$JS.ACK.x", "$JS.FC.x", "$KV.compute-work.x", "$O.x.C.y"):
        assert _may(publish, subject)
    for role in ROLES:
        assert _may(publish, f"{inbox_prefix(role)}.x")


@pytest.mark.parametrize("role", ROLES)
def test_every_role_may_ask_which_services_there_are(role: Role) -> None:
    """Service discovery is for everyone to ask, for services and nodes to answer."""
    for subject in ("$SRV.PING", "$SRV.INFO.work-marshaller", "$SRV.STATS.work-marshaller.abc"):
        assert _may(permissions(role).publish, subject)
    answers = role in (Role.SERVICES, Role.NODE)
    assert _may(permissions(role).subscribe, "$SRV.PING") == answers


def test_of_the_roles_without_inboxes_only_the_node_may_respond() -> None:
    """It answers assignments; clients and observers answer nothing."""
    assert [role for role in ROLES if permissions(role).may_respond] == [Role.NODE]


@pytest.mark.parametrize("role", ROLES)
def test_nobody_publishes_the_recorded_state(role: Role) -> None:
    """The server republishes it from the store, so that it is true whenever it is seen."""
    assert not _may(permissions(role).publish, work.STATE.at("w-1"))


def test_plain_clients_have_the_prefix_of_every_nats_library() -> None:
    """An ordinary NATS program needs nothing but the address."""
    assert inbox_prefix(Role.CLIENT) == "_INBOX"


@pytest.mark.parametrize("role", ROLES)
def test_an_inbox_of_any_role_is_recognised(role: Role) -> None:
    """Replies go there."""
    assert is_inbox(f"{inbox_prefix(role)}.abc.def")


@pytest.mark.parametrize(
    "subject", ["", "_INBOX", "_INBOX.", "_INBOX_other.x", "$KV.compute-work.x", work.COMPLETED.subject]
)
def test_a_subject_outside_the_inboxes_is_no_place_for_a_reply(subject: str) -> None:
    """A request may name any reply subject; services answer only into inboxes."""
    assert not is_inbox(subject)
