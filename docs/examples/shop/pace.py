"""Take as long as asking somebody else would, so that there is something to watch."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from eventbus import Context

Around = Callable[[Context, Callable[[Context], Awaitable[Any]]], Awaitable[Any]]


async def pause(seconds: float) -> None:
    """Wait."""
    await anyio.sleep(seconds)


def taking(seconds: float) -> Around:
    """Return a middleware that waits before a handler's transaction opens: in it, everybody else would wait too."""

    async def around(ctx: Context, call_next: Callable[[Context], Awaitable[Any]]) -> Any:
        await pause(seconds)
        return await call_next(ctx)

    return around
