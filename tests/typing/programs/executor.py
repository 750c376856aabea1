"""Executors as packages write them."""

from pathlib import Path
from typing import Any, assert_type

from computemesh.contracts.base import Message
from computemesh.executors import EngineAddress, ExecutionError, Executor, Progress, Task


class Payload(Message, frozen=True, kw_only=True):
    text: str


class Good(Executor):
    needs_engine = True

    def prepare(self) -> None:
        self.ready = True

    def run(self, task: Task, out_dir: Path, progress: Progress) -> dict[str, int]:
        asked = task.payload_as(Payload)
        assert_type(asked, Payload)
        assert_type(task.payload, dict[str, Any])
        assert_type(task.engine, EngineAddress | None)
        progress("half", fraction=0.5)
        progress()
        progress("half", 0.5)  # expect: call-arg reportCallIssue
        progress(fraction="half")  # expect: arg-type reportArgumentType
        task.payload_as(dict)  # expect: type-var reportArgumentType
        if not asked.text:
            raise ExecutionError("payload.text: nothing to do", code="bad_payload")
        raise ExecutionError("no", fault="nobody")  # expect: arg-type reportArgumentType


class WithoutRun(Executor): ...


class FewerArguments(Executor):
    def run(self, task: Task) -> None: ...  # expect: override reportIncompatibleMethodOverride


class OtherFlag(Executor):
    needs_engine = "yes"  # expect: assignment reportAssignmentType

    def run(self, task: Task, out_dir: Path, progress: Progress) -> Any: ...


Good()
WithoutRun()  # expect: abstract reportAbstractUsage
