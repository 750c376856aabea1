"""Goal: a call that does not come back costs its caller a bounded wait, and nothing else.

Method: functions that wait until the test lets them go on.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from computemesh.testing import until
from computemesh_services.resource_detector.patience import Answer, Patient


class Slow:
    """Counts its calls, and waits in each while it is held."""

    def __init__(self) -> None:
        self.calls = 0
        self.free = threading.Event()
        self.free.set()

    def __call__(self) -> int:
        self.calls += 1
        call = self.calls
        assert self.free.wait(30)
        return call


async def test_each_call_is_made_afresh() -> None:
    """What is answered is never older than the question when the function comes back."""
    patient = Patient(Slow(), initial=0, patience_s=30)
    assert [await patient.get() for _ in range(3)] == [Answer(1), Answer(2), Answer(3)]


async def test_a_call_that_does_not_come_back_leaves_the_answer_before_and_says_since_when() -> None:
    """The second caller does not wait again for a call that has used up its patience."""
    slow = Slow()
    patient = Patient(slow, initial=0, patience_s=0.05)
    assert await patient.get() == Answer(1)
    slow.free.clear()
    async with asyncio.timeout(10):
        first = await patient.get()
        second = await patient.get()
    assert (first.value, second.value, slow.calls) == (1, 1, 2)
    assert 0.05 <= first.silent_s <= second.silent_s
    slow.free.set()


async def test_without_any_answer_yet_the_initial_one_is_given() -> None:
    """A driver may hang from the start."""
    slow = Slow()
    slow.free.clear()
    answer = await Patient(slow, initial=7, patience_s=0.01).get()
    assert (answer.value, answer.silent_s > 0) == (7, True)
    slow.free.set()


async def test_once_the_call_came_back_the_next_caller_gets_a_fresh_answer() -> None:
    """A driver that recovers is heard again."""
    slow = Slow()
    patient = Patient(slow, initial=0, patience_s=0.01)
    slow.free.clear()
    await patient.get()
    slow.free.set()
    found = [await patient.get()]
    while found[-1].silent_s:
        await asyncio.sleep(0.01)
        found.append(await patient.get())
    assert found[-1].value >= 1
    assert await patient.get() == Answer(found[-1].value + 1)


async def test_callers_that_come_together_share_one_call() -> None:
    """A driver is asked once, whoever wants to know."""
    slow = Slow()
    patient = Patient(slow, initial=0, patience_s=30)
    slow.free.clear()
    asked = [asyncio.create_task(patient.get()) for _ in range(5)]
    await until(lambda: slow.calls == 1, what="the call began")
    slow.free.set()
    assert await asyncio.gather(*asked) == [Answer(1)] * 5


async def test_what_the_function_raises_reaches_its_caller_and_the_next_call_is_made() -> None:
    """A defect is not hidden."""
    fails = [True]

    def function() -> str:
        if fails.pop() if fails else False:
            raise ZeroDivisionError
        return "whole"

    patient = Patient(function, initial="", patience_s=30)
    with pytest.raises(ZeroDivisionError):
        await patient.get()
    assert await patient.get() == Answer("whole")


def test_a_process_ends_although_a_call_in_it_does_not() -> None:
    """The threads of an executor would be waited for."""
    program = """
import asyncio, time
from computemesh_services.resource_detector.patience import Patient
asyncio.run(Patient(lambda: time.sleep(600), initial=None, patience_s=0.01).get())
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"
