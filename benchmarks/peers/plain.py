"""Do the work without a library: awaiting one handler after another, and a bare memory stream."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from anyio import create_memory_object_stream

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import FORGET, PUBLISHES, SEND, Handler, answer, handlers_for


def one_by_one(handlers: list[Handler]) -> Handler:
    async def publish(event: object) -> None:
        for handler in handlers:
            await handler(event)

    return publish


async def through_stream(passes: int) -> None:
    send, receive = create_memory_object_stream[object](passes)
    with receive:
        with send:
            for _ in range(passes):
                send.send_nowait(object())
        async for event in receive:
            await answer(event)


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    publishes = {name: calls(one_by_one(handlers_for(name)), object()) for name in PUBLISHES}
    yield {SEND: calls(answer, object()), **publishes, FORGET: through_stream}
