"""What the logs say went wrong: pure functions over their lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from computemesh.cli import log_lines
from computemesh.cli.doctor.facts import Complaint, Violation

# 127.0.0.1:34100 - cid:30 - "v2.16.0:python3:plain" - "$G/user:client"
#   - Publish Violation - Subject "$KV.compute-work.x"
_CLIENT: Final = re.compile(r'"v[^":]*:[^":]*:(?P<client>[^"]*)"')
_USER: Final = re.compile(r'"[^"]*user:(?P<user>[^"]*)"')
_DENIED: Final = re.compile(r'(?P<verb>Publish|Subscription) Violation .*?Subject "(?P<subject>[^"]*)"')
_LOGIN: Final = re.compile(r'authentication error(?: - User "(?P<user>[^"]*)")?')

_NOT_PERMITTED: Final = "not permitted"
_SERVICE_DENIED: Final = re.compile(
    r'violation for (?P<verb>publish|subscription) to "(?P<subject>[^"]*)"', re.IGNORECASE
)


def server_violations(lines: Iterable[str], *, since: float) -> list[Violation]:
    """What the NATS server denied since then, each user and subject once. Its log has local time."""
    return _summed(found for line in lines if (found := _server_violation(line)) is not None and found.last_at >= since)


def _server_violation(line: str) -> Violation | None:
    entry = log_lines.parse("nats-server", line)
    if entry is None or entry.level != "error":
        return None
    at, client, user = entry.at, _CLIENT.search(entry.event), _USER.search(entry.event)
    name = client["client"] if client else ""
    if denied := _DENIED.search(entry.event):
        return Violation(
            who=user["user"] if user else "somebody",
            verb=denied["verb"].lower(),
            subject=denied["subject"],
            count=1,
            last_at=at,
            client=name,
        )
    if login := _LOGIN.search(entry.event):
        return Violation(who=login["user"] or "", verb="login", subject="", count=1, last_at=at, client=name)
    return None


def service_log(
    service: str, lines: Iterable[str], *, since: float, file: str
) -> tuple[list[Violation], list[Complaint]]:
    """What a service logged since then: subjects it was denied, and errors, each once."""
    violations: list[Violation] = []
    complaints: dict[str, Complaint] = {}
    for line in lines:
        entry = log_lines.parse(service, line)
        if entry is None or entry.level not in ("error", "critical") or entry.at < since:
            continue
        at, event, reason = entry.at, entry.event, _reason(entry.fields)
        if event == _NOT_PERMITTED and (denied := _SERVICE_DENIED.search(reason)):
            violations.append(
                Violation(who=service, verb=denied["verb"], subject=denied["subject"], count=1, last_at=at)
            )
        elif event == _NOT_PERMITTED:
            violations.append(Violation(who=service, verb="use", subject=reason, count=1, last_at=at))
        else:
            before = complaints.get(event)
            complaints[event] = Complaint(
                service=service,
                event=event,
                reason=reason,
                count=before.count + 1 if before else 1,
                last_at=at,
                file=file,
            )
    return _summed(violations), list(complaints.values())


def _reason(fields: Mapping[str, Any]) -> str:
    """The reason given, or the last line of the trace."""
    if reason := fields.get("reason"):
        return str(reason)
    return next(reversed(str(fields.get("exception", "")).strip().splitlines()), "")


def _summed(found: Iterable[Violation]) -> list[Violation]:
    """One line for each user, verb and subject, with the number of times and the last of them."""
    sums: dict[tuple[str, str, str], Violation] = {}
    for one in found:
        key = (one.who, one.verb, one.subject)
        before = sums.get(key)
        sums[key] = Violation(
            who=one.who,
            verb=one.verb,
            subject=one.subject,
            count=(before.count if before else 0) + 1,
            last_at=max(one.last_at, before.last_at if before else 0.0),
            client=one.client,
        )
    return list(sums.values())
