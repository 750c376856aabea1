"""A program that declares contracts of its own and reads those of the mesh."""

from typing import assert_type

from computemesh.contracts import work
from computemesh.contracts.base import Event, Message, Refused, Request, Role, ServiceCard, convert, decode, encode
from computemesh.contracts.work import WorkGet, WorkItem, WorkProgress, WorkRecord


class Ping(Message, frozen=True, kw_only=True):
    text: str


class Pong(Message, frozen=True, kw_only=True):
    text: str


ANY = frozenset(Role)
TOY = ServiceCard(name="toy", about="A toy.", role=Role.SERVICES, port=8199)

PING = Request(subject="compute.toy.ping.v1", takes=Ping, gives=Pong, asked_by=ANY, service=TOY)
PONGED = Event(subject="compute.toy.ponged.v1", payload=Pong, sent_by=ANY, read_by=ANY)

assert_type(PING, Request[Ping, Pong])
assert_type(PONGED, Event[Pong])
assert_type(work.GET, Request[WorkGet, WorkRecord])
assert_type(work.SUBMIT, Event[WorkItem])
assert_type(work.PROGRESS, Event[WorkProgress])

assert_type(decode(b"{}", Ping), Ping | Refused)
assert_type(convert({"text": "a"}, Ping), Ping | Refused)
assert_type(encode(Ping(text="a")), bytes)

Request(subject="a.b.v1", takes=str, gives=Pong, asked_by=ANY, service=TOY)  # expect: type-var reportArgumentType
Request(subject="a.b.v1", takes=Ping, asked_by=ANY, service=TOY)  # expect: call-arg reportCallIssue
Event(subject="compute.toy.x.v1", payload=Pong, sent_by=["node"], read_by=ANY)  # expect: arg-type reportArgumentType
Ping("a")  # expect: call-arg reportCallIssue
Ping(text=1)  # expect: arg-type reportArgumentType
Ping(text="a").text = "b"  # expect: misc reportAttributeAccessIssue
decode(b"{}", Ping).text  # expect: union-attr reportAttributeAccessIssue reportUnknownMemberType
