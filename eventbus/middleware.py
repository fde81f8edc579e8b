"""One callable shape around a handler, and how a chain of them is built."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from eventbus.context import Context

__all__ = ("CallNext", "Middleware", "chain")

CallNext = Callable[[Context], Awaitable[Any]]
"""What a middleware calls to go on: ``await call_next(ctx)`` returns what the handler returned."""

Middleware = Callable[[Context, CallNext], Awaitable[Any]]
"""``async def middleware(ctx, call_next)``: goes on with ``return await call_next(ctx)``."""


def chain(middleware: Sequence[Middleware], last: CallNext) -> CallNext:
    """Return one call that goes through ``middleware``, outermost first, and ends in ``last``."""
    call = last
    for around in reversed(middleware):
        call = _link(around, call)
    return call


def _link(around: Middleware, inner: CallNext) -> CallNext:
    def call(ctx: Context) -> Awaitable[Any]:
        return around(ctx, inner)

    return call
