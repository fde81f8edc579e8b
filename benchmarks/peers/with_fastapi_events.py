# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with fastapi-events, whose dispatch starts a task; that task is waited for here."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi_events import handler_store, middleware_identifier
from fastapi_events.dispatcher import dispatch
from fastapi_events.handlers.local import LocalHandler

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import FORGET, PUBLISHES, answer, handlers_for


class Counting:
    """Know when all that was dispatched has been handled."""

    def __init__(self, handlers) -> None:
        self.local, self.left, self.done = LocalHandler(), 0, asyncio.Event()
        for handler in handlers:
            self.local.register(handler, event_name="told")

    async def handle(self, event) -> None:
        await self.local.handle(event)
        self.left -= 1
        if not self.left:
            self.done.set()


def publishing(handlers) -> Loop:
    counting = Counting(handlers)
    handler_store[id(counting)] = [counting]

    async def forget(passes: int) -> None:
        middleware_identifier.set(id(counting))
        counting.left = passes
        counting.done.clear()
        for _ in range(passes):
            dispatch("told", {"number": 1})
        await counting.done.wait()

    return forget


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    loops = {name: calls(publishing(handlers_for(name)), 1) for name in PUBLISHES}
    yield {**loops, FORGET: publishing([answer])}
