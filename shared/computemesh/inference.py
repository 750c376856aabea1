"""What a work item of type ``inference`` asks: its payload, checked where it is written and where it is run. Pure."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Final

import msgspec

from computemesh.contracts.base import Message, Refused, convert

PROMPTS_MAX: Final = 1024
"""Prompts in one item. More belong into several items, which can run on several nodes."""

FORMS: Final = ("prompt", "prompts", "messages")
"""Fields of which exactly one is set: in what form the prompts are given."""

_Prompts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)]
_Stops = Annotated[list[str], msgspec.Meta(max_length=16)]


class ChatMessage(Message, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    role: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    content: str | list[dict[str, Any]]
    """Text, or OpenAI's content parts."""
    name: str | None = None


_Chat = Annotated[list[ChatMessage], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)]


class InferencePayload(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of the first three fields is set."""

    prompt: str | _Prompts | None = None
    """Each becomes a chat of one user message, as instruct models want it."""
    prompts: _Prompts | None = None
    messages: Annotated[list[ChatMessage | _Chat], msgspec.Meta(min_length=1, max_length=PROMPTS_MAX)] | None = None
    """One chat, or a list of chats."""
    raw: bool = False
    """Continue the prompts as they are, without the model's chat template."""
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=32768)] = 256
    """Of each answer."""
    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=1_000_000)] | None = None
    """-1: no bound."""
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] | None = None
    stop: str | _Stops | None = None


def parse(payload: dict[str, Any]) -> InferencePayload | Refused:
    """The payload, checked; a refusal has the code ``bad_payload`` and names the field inside the payload."""
    parsed = convert(payload, InferencePayload)
    if isinstance(parsed, Refused):
        return _bad(parsed.field, _reason(parsed))
    given = [name for name in FORMS if getattr(parsed, name) is not None]
    if len(given) != 1:
        what = " and ".join(given) if given else "none of them"
        return _bad(given[-1] if given else "prompt", f"give exactly one of {', '.join(FORMS)}; got {what}")
    if parsed.raw and parsed.messages is not None:
        return _bad("raw", "goes with prompt or prompts, not with messages")
    messages = parsed.messages or []
    if 0 < sum(isinstance(message, ChatMessage) for message in messages) < len(messages):
        return _bad("messages", "is one chat or a list of chats, not a mixture")
    return parsed


def chats(messages: list[ChatMessage | list[ChatMessage]]) -> list[list[ChatMessage]]:
    """The chats in ``messages``, which is one, or a list of them."""
    one = [message for message in messages if isinstance(message, ChatMessage)]
    return [one] if one else [chat for chat in messages if isinstance(chat, list)]


def _reason(refused: Refused) -> str:
    """For a field that does not exist, with the one that was probably meant."""
    if "unknown field" not in refused.reason:
        return refused.reason
    inside, _, name = refused.field.rpartition(".")
    known = ChatMessage if inside else InferencePayload
    close = difflib.get_close_matches(name, known.__struct_fields__, 1)
    return "no such field" + (f"; did you mean {close[0]}?" if close else "")


def _bad(field: str, reason: str) -> Refused:
    return Refused(code="bad_payload", field=field, reason=reason)
