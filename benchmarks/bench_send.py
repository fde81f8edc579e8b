"""Measure what sending one command to its one handler takes, in awaits of the handler itself."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import lru_cache
from typing import Annotated, Any, cast

from fastapi import Depends

from benchmarks.measure import Effort, Goal, Loop, Row, Sample, calls, race
from eventbus import Command, Context, Event, EventBus, Module

__all__ = ("rows",)


class Ask(Command[int], name="bench.ask"):
    number: int


class Told(Event, name="bench.told"):
    number: int


class Stock:
    """Be what a dependency brings."""

    left = 1


@lru_cache
def cached_stock() -> Stock:
    return Stock()


async def opened_stock() -> AsyncIterator[Stock]:
    yield Stock()


async def answer(_: Ask) -> int:
    return 1


async def answer_with_cached(_: Ask, stock: Annotated[Stock, Depends(cached_stock)]) -> int:
    return stock.left


async def answer_in_context(_: Ask, ctx: Context, stock: Annotated[Stock, Depends(opened_stock)]) -> int:
    return ctx.attempt + stock.left


async def answer_with_id(_: Ask, ctx: Context, stock: Annotated[Stock, Depends(opened_stock)]) -> int:
    return len(ctx.correlation_id) + stock.left


async def pass_on(ctx: Context, call_next: Callable[[Context], Awaitable[Any]]) -> Any:
    return await call_next(ctx)


def bus_of(handler: Callable[..., Any], *, middleware: int = 0, routed: bool = False) -> EventBus:
    module = Module("bench", messages=[Told])
    module.handles(Ask)(handler)
    bus = EventBus(module, middleware=[pass_on] * middleware, routes={Told: "memory"} if routed else None)
    bus.compile()
    return bus


def bus_of_many(types: int) -> tuple[EventBus, Command[int]]:
    """Return a bus that knows so many commands, and one of them."""
    module, commands = Module("bench"), list[type[Command[int]]]()
    for number in range(types):
        command = cast("type[Ask]", type(f"Ask{number}", (Command[int],), {}))
        module.handles(command, name=f"answer_{number}")(_answering())
        commands.append(command)
    return EventBus(module), commands[types // 2]()


def _answering() -> Callable[[Ask], Coroutine[Any, Any, int]]:
    async def answer_one(_: Command[int]) -> int:
        return 1

    return answer_one


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons."""
    ask, stock, context = Ask(number=1), Stock(), Context.of(Ask(number=1))
    one, the_one = bus_of_many(1)
    many, one_of_many = bus_of_many(1_000)
    loops: dict[str, Loop] = {
        "direct": calls(answer, ask),
        "direct with stock": calls(answer_with_cached, ask, stock),
        "direct in context": calls(answer_in_context, ask, context, stock),
        "send": calls(bus_of(answer).send, ask),
        "routed": calls(bus_of(answer, routed=True).send, ask),
        "cached": calls(bus_of(answer_with_cached).send, ask),
        "1 middleware": calls(bus_of(answer, middleware=1).send, ask),
        "3 middleware": calls(bus_of(answer, middleware=3).send, ask),
        "context": calls(bus_of(answer_in_context, routed=True).send, ask),
        "id": calls(bus_of(answer_with_id, routed=True).send, ask),
        "1 type": calls(one.send, the_one),
        "1,000 types": calls(many.send, one_of_many),
    }
    took = await race(effort, loops)
    direct, injected = "await handler(command)", "await handler(command, stock)"

    def times(what: str, ours: Sample, goal: Goal | None = None) -> Row:
        return Row(what, ours, direct, took["direct"], goal)

    in_context = "await handler(command, context, stock)"
    return [
        times("send", took["send"], Goal(1.5 if sys.version_info >= (3, 12) else 2.3, peer="diator 12.7")),
        times("send, on a bus that also has routes", took["routed"], Goal(5)),
        Row("send, a dependency behind lru_cache", took["cached"], injected, took["direct with stock"],
            Goal(2, peer="mediatr 31")),
        times("the first middleware adds", took["1 middleware"] - took["send"], Goal(2.5)),
        times("each further middleware adds", (took["3 middleware"] - took["1 middleware"]) / 2, Goal(1.2)),
        Row("send, context and one yield dependency, routes", took["context"], in_context, took["direct in context"],
            Goal(25)),
        Row("the same, and the handler reads correlation_id", took["id"], in_context, took["direct in context"]),
        Row("send, 1,000 registered types", took["1,000 types"], "1 registered type", took["1 type"],
            Goal(1.0, slack=0.1)),
    ]  # fmt: skip
