"""The counts of handlings."""

from typing import Any

import anyio
import pytest

from eventbus import Command, Event, EventBus, Module, Reject, Retry, RetryLater
from eventbus.middlewares.metrics import Count, Metrics
from eventbus.testing import harness


class Paid(Event, name="t.paid"):
    """State that something was paid."""

    number: int = 0


class Ask(Command[int], name='t."ask"'):
    """Ask for something."""


class Hand:
    """Be a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def counted(**told: Any) -> Count:
    """Return a count that is nothing but what is told."""
    nothing = dict.fromkeys(("done", "failed", "rejected", "postponed", "cancelled", "retried"), 0)
    return Count(**{**nothing, "seconds": 0.0, "slowest": 0.0, "handler": "m.paid", "message": "t.paid", **told})


async def test_outcomes_and_attempts() -> None:
    """Every handling is counted once by how it ended, and again if it was no first attempt."""
    module, metrics = Module("m"), Metrics(Hand())
    errors: dict[int, list[Exception]] = {1: [ValueError()], 2: [Reject("no")], 3: [RetryLater(1)]}

    @module.on(Paid, retry=Retry(attempts=3, initial=1, jitter=False))
    async def paid(event: Paid) -> None:
        if errors.get(event.number):
            raise errors[event.number].pop()

    async with harness(EventBus(module, routes={Paid: "memory"}, middleware=[metrics])) as t:
        for number in range(4):
            await t.publish(Paid(number=number))
        await t.advance(10)
        assert len(t.failed("m.paid")) == 3
        assert len(t.dead) == 1
    assert [counted(done=3, failed=1, rejected=1, postponed=1, retried=2)] == metrics.counts()


async def test_times_of_each_handler_and_message() -> None:
    """Times are added up, and the longest is kept, for each handler and message by itself."""
    module, clock = Module("m"), Hand()
    metrics = Metrics(clock)

    @module.on(Paid)
    async def paid(event: Paid) -> None:
        clock.now += event.number

    @module.handles(Ask)
    async def ask(command: Ask) -> int:
        clock.now += 0.5
        return 1

    bus = EventBus(module, middleware=[metrics])
    for number in (1, 4, 2):
        await bus.publish(Paid(number=number))
    assert await bus.send(Ask()) == 1
    assert [
        counted(handler="m.ask", message='t."ask"', done=1, seconds=0.5, slowest=0.5),
        counted(done=3, seconds=7.0, slowest=4.0),
    ] == metrics.counts()


async def test_cancelled_is_neither() -> None:
    """A handling that is cancelled is counted as that."""
    module, metrics = Module("m"), Metrics(Hand())

    @module.on(Paid)
    async def paid(event: Paid) -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0):
        await EventBus(module, middleware=[metrics]).publish(Paid())
    assert [counted(cancelled=1)] == metrics.counts()


async def test_prometheus() -> None:
    """The counts are served as text, names escaped."""
    module, clock = Module("m"), Hand()
    metrics = Metrics(clock)

    @module.handles(Ask)
    async def ask(command: Ask) -> int:
        clock.now += 0.5
        raise LookupError

    with pytest.raises(LookupError):
        await EventBus(module, middleware=[metrics]).send(Ask())
    lines = metrics.prometheus().splitlines()
    who = r'handler="m.ask",message="t.\"ask\""'
    assert f'eventbus_handlings_total{{{who},outcome="failed"}} 1' in lines
    assert f'eventbus_handlings_total{{{who},outcome="done"}} 0' in lines
    assert f"eventbus_handling_seconds_sum{{{who}}} 0.5" in lines
    assert f"eventbus_handling_seconds_count{{{who}}} 1" in lines
    assert f"eventbus_handling_seconds_max{{{who}}} 0.5" in lines
    assert f"eventbus_retried_total{{{who}}} 0" in lines
    assert len([line for line in lines if line.startswith("# TYPE")]) == 4
    assert metrics.prometheus().endswith("\n")
