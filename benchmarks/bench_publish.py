"""Measure what publishing one event to its inline handlers takes, beside a task group with one child per handler."""

from asyncio import gather, sleep
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from anyio import create_task_group

from benchmarks.measure import Effort, Goal, Loop, Row, calls, race
from eventbus import Event, EventBus, Module

__all__ = ("rows",)

Handler = Callable[[Any], Coroutine[Any, Any, None]]

MIXES = {
    "3 handlers, none suspends": (3, 0, Goal(0.20, peer="> 0.4")),
    "10 handlers, none suspends": (10, 0, Goal(0.10, peer="> 0.4")),
    "3 handlers, all suspend once": (3, 3, Goal(0.9)),
    "10 handlers, all suspend once": (10, 10, Goal(1.05)),
    "10 handlers, one suspends once": (10, 1, None),
}
"""What is measured -> handlers, how many of them suspend, and the goal."""


class Told(Event, name="bench.told"):
    number: int


def make_handlers(count: int, suspending: int) -> list[Handler]:
    return [suspends() if index < suspending else is_quiet() for index in range(count)]


def is_quiet() -> Handler:
    async def take(_: Told) -> None:
        pass

    return take


def suspends() -> Handler:
    async def take(_: Told) -> None:
        await sleep(0)

    return take


def bus_of(handlers: Sequence[Handler]) -> EventBus:
    module = Module("bench")
    for number, handler in enumerate(handlers):
        module.on(Told, name=f"take_{number}")(handler)
    bus = EventBus(module)
    bus.compile()
    return bus


def grouped(handlers: Sequence[Handler]) -> Handler:
    async def publish(event: Told) -> None:
        async with create_task_group() as group:
            for handler in handlers:
                group.start_soon(handler, event)

    return publish


def gathered(handlers: Sequence[Handler]) -> Handler:
    async def publish(event: Told) -> None:
        await gather(*[handler(event) for handler in handlers])

    return publish


def one_by_one(handlers: Sequence[Handler]) -> Handler:
    async def publish(event: Told) -> None:
        for handler in handlers:
            await handler(event)

    return publish


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons."""
    event, found = Told(number=1), list[Row]()
    for what, (count, suspending, goal) in MIXES.items():
        handlers = make_handlers(count, suspending)
        loops: dict[str, Loop] = {
            "publish": calls(bus_of(handlers).publish, event),
            "task group": calls(grouped(handlers), event),
            "gather": calls(gathered(handlers), event),
            "one by one": calls(one_by_one(handlers), event),
        }
        took = await race(effort, loops)
        found += [
            Row(what, took["publish"], "task group", took["task group"], goal),
            Row(what, took["publish"], "asyncio.gather", took["gather"]),
            Row(what, took["publish"], "one after another", took["one by one"]),
        ]
    return found
