"""The only package that speaks NATS. Everything else sees contracts, buckets, pulls and leases."""

from computemesh.bus.connection import Bus, Where
from computemesh.bus.errors import BusError, Conflict, NoResponder, NotAdmitted, NotStored, TimedOut, Unreachable
from computemesh.bus.kv import Bucket, Entry, Mirror, Write
from computemesh.bus.micro import MicroService
from computemesh.bus.objects import ObjectInfo, ObjectStore
from computemesh.bus.parts import PartsInbox
from computemesh.bus.pipeline import Pipeline, Posts, Reply
from computemesh.bus.pull import Pull, Stored
from computemesh.bus.writer import Writer

__all__ = [
    "Bucket",
    "Bus",
    "BusError",
    "Conflict",
    "Entry",
    "MicroService",
    "Mirror",
    "NoResponder",
    "NotAdmitted",
    "NotStored",
    "ObjectInfo",
    "ObjectStore",
    "PartsInbox",
    "Pipeline",
    "Posts",
    "Pull",
    "Reply",
    "Stored",
    "TimedOut",
    "Unreachable",
    "Where",
    "Write",
    "Writer",
]
