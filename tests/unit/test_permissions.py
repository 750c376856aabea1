"""What each role may say and hear on the bus, and what passes from one account to another."""

from __future__ import annotations

import pytest

from computemesh.contracts import engines, work
from computemesh.contracts.base import Role
from computemesh.contracts.catalog import events, requests
from computemesh.contracts.permissions import (
    ACCOUNTS,
    Crossing,
    Identity,
    Permissions,
    crossings,
    identity,
    inbox_prefix,
    is_inbox,
    permissions,
    user_name,
)

ROLES = list(Role)
OUTSIDERS = [role for role in ROLES if role is not Role.SERVICES]


def granted(role: Role) -> Permissions:
    """Of a role's user; of the node ``x``, when the role is that of nodes."""
    return permissions(role, "x" if role is Role.NODE else "")


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


# --- users ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_role_publishes_exactly_the_events_it_sends(role: Role) -> None:
    """An event goes out from its senders and from nobody else, unless it shares a subject with a request."""
    asked = {request.subject for request in requests() if role in request.asked_by and not request.target}
    for event in events():
        subject = event.at("x" if event.target else "")
        assert _may(granted(role).publish, subject) == (role in event.sent_by or subject in asked)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_publishes_exactly_the_requests_it_asks(role: Role) -> None:
    """A question comes from those who may ask it."""
    for request in requests():
        subject = request.at("x" if request.target else "")
        assert _may(granted(role).publish, subject) == (role in request.asked_by)


@pytest.mark.parametrize("role", ROLES)
def test_only_the_role_that_answers_a_request_hears_it(role: Role) -> None:
    """A question is nobody else's business."""
    for request in requests():
        subject = request.at("x" if request.target else "")
        assert _may(granted(role).subscribe, subject) == (role is request.answered_by)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_hears_the_events_it_reads(role: Role) -> None:
    """Readers of an event may subscribe to all of its targets at once."""
    for event in events():
        assert (event.at("*" if event.target else "") in granted(role).subscribe) == (role in event.read_by)


def test_a_node_speaks_and_answers_for_no_other_node() -> None:
    """Wherever a subject names a node, it is the one whose user this is."""
    mine = permissions(Role.NODE, "x")
    for event in events():
        if event.target == "node_id" and Role.NODE in event.sent_by:
            assert _may(mine.publish, event.at("x"))
            assert not _may(mine.publish, event.at("y"))
    for request in requests():
        if request.target == "node_id":
            assert _may(mine.subscribe, request.at("x"))
            assert not _may(mine.subscribe, request.at("y"))
            assert not _may(mine.publish, request.at("y"))


def test_a_node_hears_no_other_nodes_inbox() -> None:
    """Replies to one are not for the others, though they share an account."""
    mine = permissions(Role.NODE, "x")
    assert _may(mine.subscribe, f"{inbox_prefix(Role.NODE, 'x')}.abc")
    for other in (inbox_prefix(Role.NODE, "y"), inbox_prefix(Role.NODE)):
        assert not _may(mine.subscribe, f"{other}.abc")
        assert not _may(mine.publish, f"{other}.abc")


@pytest.mark.parametrize("role", ROLES)
def test_a_role_hears_no_inbox_but_its_own(role: Role) -> None:
    """With another's inbox it could read replies that are not meant for it."""
    for other in ROLES:
        assert _may(granted(role).subscribe, f"{inbox_prefix(other)}.x.y") == (role is other)


@pytest.mark.parametrize("role", OUTSIDERS)
def test_outside_the_services_nobody_reaches_the_store(role: Role) -> None:
    """JetStream and the records belong to the services."""
    for subject in ("$JS.API.INFO", "$JS.ACK.x", "$JS.FC.x", "$KV.compute-work.x", "$O.x.C.y", "$SYS.x"):
        assert not _may(granted(role).publish, subject)
        assert not _may(granted(role).subscribe, subject)


def test_only_those_who_answer_requests_may_publish_replies() -> None:
    """The server makes the subject of such a reply, and lets nobody else name one."""
    assert [role for role in ROLES if _may(granted(role).publish, "_R_.abc.def")] == [Role.SERVICES, Role.NODE]


@pytest.mark.parametrize("role", [Role.CLIENT, Role.OBSERVER])
def test_those_who_answer_nothing_publish_in_no_inbox(role: Role) -> None:
    """A forged reply needs a place to go."""
    for other in ROLES:
        assert not _may(granted(role).publish, f"{inbox_prefix(other)}.x")


def test_services_reach_the_store() -> None:
    """They own what is kept."""
    for subject in ("$JS.API.INFO", "$JS.ACK.x", "$JS.FC.x", "$KV.compute-work.x", "$O.x.C.y"):
        assert _may(granted(Role.SERVICES).publish, subject)


@pytest.mark.parametrize("role", ROLES)
def test_service_discovery_is_asked_by_people_and_answered_by_services_and_nodes(role: Role) -> None:
    """Nodes do not ask: another node would try to answer into their inbox, and may not."""
    answers = role in (Role.SERVICES, Role.NODE)
    for subject in ("$SRV.PING", "$SRV.INFO.work-marshaller", "$SRV.STATS.work-marshaller.abc"):
        assert _may(granted(role).publish, subject) == (role is not Role.NODE)
        assert _may(granted(role).subscribe, subject) == answers


@pytest.mark.parametrize("role", ROLES)
def test_nobody_publishes_the_recorded_state(role: Role) -> None:
    """The server republishes it from the store, so that it is true whenever it is seen."""
    for fact in (work.STATE, engines.CHANGED):
        assert not _may(granted(role).publish, fact.at("w-1"))


# --- accounts ------------------------------------------------------------------------------------------------


def test_each_role_has_an_account_of_its_own() -> None:
    """What one may reach by a reply subject ends at the border of its account."""
    assert len(set(ACCOUNTS.values())) == len(Role)


def _crosses(exporter: Role, importer: Role, subject: str, kind: str) -> bool:
    return any((c.exporter, c.importer, c.subject, c.kind) == (exporter, importer, subject, kind) for c in crossings())


def test_every_request_reaches_the_account_that_answers_it_and_no_other() -> None:
    """From each role that asks."""
    for request in requests():
        subject = request.at("*" if request.target else "")
        for asker in ROLES:
            for answerer in ROLES:
                wanted = asker is not answerer and asker in request.asked_by and answerer is request.answered_by
                assert _crosses(answerer, asker, subject, "service") == wanted


def test_a_captured_event_reaches_the_store_as_a_request_and_readers_as_an_event() -> None:
    """As an event the store's acknowledgement would go to a reply subject among the services."""
    for event in events():
        if event.captured:
            for sender in event.sent_by - {Role.SERVICES}:
                assert _crosses(Role.SERVICES, sender, event.subject, "service")
                assert not _crosses(sender, Role.SERVICES, event.subject, "stream")
                for reader in event.read_by - {sender, Role.SERVICES}:
                    assert _crosses(sender, reader, event.subject, "stream")


@pytest.mark.parametrize("crossing", crossings(), ids=str)
def test_what_crosses_is_what_somebody_there_may_send_and_somebody_here_may_hear(crossing: Crossing) -> None:
    """An import that nobody may use would be a hole in waiting."""
    sender, hearer = (
        (crossing.importer, crossing.exporter) if crossing.kind == "service" else (crossing.exporter, crossing.importer)
    )
    from_the_server = crossing.subject in (work.STATE.at("*"), engines.CHANGED.at("*"))
    assert from_the_server or _may(granted(sender).publish, crossing.subject)
    assert _may(granted(hearer).subscribe, crossing.subject)


# --- names ---------------------------------------------------------------------------------------------------


def test_plain_clients_have_the_prefix_of_every_nats_library() -> None:
    """An ordinary NATS program needs nothing but the address."""
    assert inbox_prefix(Role.CLIENT) == "_INBOX"


@pytest.mark.parametrize(
    "who", [Identity(Role.SERVICES), Identity(Role.CLIENT), Identity(Role.OBSERVER), Identity(Role.NODE, "a-1")]
)
def test_a_user_name_tells_whose_it_is(who: Identity) -> None:
    """A program that was given an address knows its inbox from it."""
    assert identity(user_name(who.role, who.node_id)) == who


def test_a_node_that_is_called_like_a_role_is_a_node() -> None:
    """Names of nodes are free, and must not make a service of one."""
    assert identity(user_name(Role.NODE, "services")) == Identity(Role.NODE, "services")


@pytest.mark.parametrize("user", ["", "node", "node-", "node-a.b", "node->", "somebody", "Services"])
def test_other_user_names_are_nobodys(user: str) -> None:
    """A server that somebody else runs may have users of its own."""
    assert identity(user) is None


@pytest.mark.parametrize("prefix", [*(inbox_prefix(role) for role in ROLES), inbox_prefix(Role.NODE, "n"), "_R_"])
def test_an_inbox_of_any_role_is_recognised(prefix: str) -> None:
    """Replies go there, or by way of the server to another account."""
    assert is_inbox(f"{prefix}.abc.def")


@pytest.mark.parametrize(
    "subject", ["", "_INBOX", "_INBOX.", "_INBOX_other.x", "_R_", "$KV.compute-work.x", work.COMPLETED.subject]
)
def test_a_subject_outside_the_inboxes_is_no_place_for_a_reply(subject: str) -> None:
    """On a server without accounts a request may name any reply subject; services answer only into inboxes."""
    assert not is_inbox(subject)
