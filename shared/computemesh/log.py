"""Logging: structlog, one JSON object a line on standard output, or readable lines on a terminal.

Fields every line has: ``at`` (RFC 3339, UTC), ``level``, ``service``, ``event``; and, while a message or a
request is handled, ``trace_id`` and ``span_id`` (:mod:`computemesh.trace`). Bind more with
``structlog.contextvars.bind_contextvars``.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal, TextIO

import structlog

from computemesh import trace

LogFormat = Literal["json", "text", "auto"]


def configure(service: str, *, level: str = "info", form: LogFormat = "auto", out: TextIO | None = None) -> None:
    """Sets up structlog and the standard library's logging for this process.

    Args:
        form: ``auto`` is ``text`` on a terminal, else ``json``.
    """
    stream = out or sys.stdout
    text = form == "text" or (form == "auto" and stream.isatty())
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_trace,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(timestamp_key="at", colors=stream.isatty())]
        if text
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    # Libraries that log through the standard library end in the same stream and form.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processors=[_drop_record, *last], foreign_pre_chain=shared)
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


def _add_trace(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if here := trace.current():
        event["trace_id"], event["span_id"] = here.trace_id, here.span_id
    return event


def _drop_record(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event.pop("_record", None)
    event.pop("_from_structlog", None)
    return event


def get(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry ``part=name``."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(part=name)
    return logger
