"""One callable shape around a handler, how a chain of them is built, and the words for how it ends."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from eventbus.context import Context
from eventbus.errors import Reject, RetryLater

__all__ = ("CallNext", "Middleware", "Outgoing", "chain", "outcome_of")

CallNext = Callable[[Context], Awaitable[Any]]
"""What a middleware calls to go on: ``await call_next(ctx)`` returns what the handler returned."""

Middleware = Callable[[Context, CallNext], Awaitable[Any]]
"""``async def middleware(ctx, call_next)``: goes on with ``return await call_next(ctx)``."""


@runtime_checkable
class Outgoing(Protocol):
    """Be a middleware of the bus that also lets headers travel along with every message that has a route."""

    def outgoing(self) -> Mapping[str, str]:
        """Return headers for what this task publishes now; those of the publisher itself beat them."""
        ...


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


def outcome_of(error: BaseException | None) -> str:
    """Return the word for how a handling ended: done, failed, rejected, postponed, or cancelled, which is neither.

    >>> outcome_of(None), outcome_of(ValueError())
    ('done', 'failed')
    """
    match error:
        case None:
            return "done"
        case Reject():
            return "rejected"
        case RetryLater():
            return "postponed"
        case _:
            return "failed" if isinstance(error, Exception) else "cancelled"
