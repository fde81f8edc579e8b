# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with pyee, which starts a task for each handler; waiting for them is its own method."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from pyee.asyncio import AsyncIOEventEmitter

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import FORGET, PUBLISHES, answer, handlers_for


def publishing(name: str) -> Loop:
    emitter = AsyncIOEventEmitter()
    for handler in handlers_for(name):
        emitter.add_listener("told", handler)

    async def publish(event: object) -> None:
        emitter.emit("told", event)
        await emitter.wait_for_complete()

    return calls(publish, object())


async def forget(passes: int) -> None:
    emitter = AsyncIOEventEmitter()
    emitter.add_listener("told", answer)
    for _ in range(passes):
        emitter.emit("told", object())
    await emitter.wait_for_complete()


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    yield {**{name: publishing(name) for name in PUBLISHES}, FORGET: forget}
