"""Counts words: a whole executor, small enough to read at once."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from computemesh.contracts.base import Message
from computemesh.executors import ExecutionError, Executor, Progress, Task


class WordCountPayload(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an item of type ``word-count`` asks."""

    text: str
    top: Annotated[int, Meta(ge=1, le=100)] = 3
    """How many of the most frequent words to name."""
    pause_s: Annotated[float, Meta(ge=0, le=60)] = 0.0
    """Pause after each line, in place of work that takes its time."""


class WordCount(Executor):
    def run(self, task: Task, out_dir: Path, progress: Progress) -> dict[str, Any]:
        asked = task.payload_as(WordCountPayload)
        lines = asked.text.splitlines()
        if not lines:
            raise ExecutionError("payload.text: there is nothing to count", code="bad_payload")
        words: Counter[str] = Counter()
        for number, line in enumerate(lines, start=1):
            words.update(line.lower().split())
            progress(f"line {number} of {len(lines)}", fraction=number / len(lines))
            time.sleep(asked.pause_s)
        (out_dir / "words.txt").write_text("\n".join(sorted(words)))
        return {"words": words.total(), "most": dict(words.most_common(asked.top))}
