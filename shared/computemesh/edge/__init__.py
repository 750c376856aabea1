"""HTTP, for people and other ecosystems: a translation of the contracts, with no logic of its own."""

from computemesh.edge.http import (
    Edge,
    Extra,
    api_error,
    application,
    as_json,
    declared,
    media_type,
    parse_object,
    problem,
    question_of,
    read_body,
    read_question,
    token_needed,
)

__all__ = [
    "Edge",
    "Extra",
    "api_error",
    "application",
    "as_json",
    "declared",
    "media_type",
    "parse_object",
    "problem",
    "question_of",
    "read_body",
    "read_question",
    "token_needed",
]
