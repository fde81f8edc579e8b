"""Run the handlers of one event side by side, each in a context of its own, and collect what fails.

Handlers start in registration order. A failing handler does not disturb the others: every one runs and finishes, and
the failures come back in registration order. Only what is no ``Exception`` (``KeyboardInterrupt``, ``SystemExit``) and
a cancellation from outside end the group early, as they would end any task group.
"""

from asyncio import current_task
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextvars import copy_context
from types import coroutine
from typing import Any, TypeVar, cast

import anyio

__all__ = ("cancellings", "cut_short", "failure_in", "fan_out", "isolated")

T = TypeVar("T")


async def fan_out(calls: Sequence[Callable[[], Awaitable[Any]]]) -> list[BaseException | None]:
    """Await all calls concurrently; return for each, in order, what it raised or None.

    A cancellation from outside goes on; the calls see it too.
    """
    errors: list[BaseException | None] = [None] * len(calls)

    async def run(index: int) -> None:
        try:
            await calls[index]()
        except Exception as error:
            errors[index] = error
        except BaseException as error:
            if anyio.current_effective_deadline() == float("-inf"):
                raise
            errors[index] = failure_in(error) or error
            if errors[index] is error:
                group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for index in range(len(calls)):
            group.start_soon(run, index)
    return errors


def cancellings() -> int:
    """Return how often somebody has asked asyncio to cancel this task and not taken it back."""
    try:
        task = current_task()
    except RuntimeError:  # not asyncio
        return 0
    return 0 if task is None else task.cancelling()


def cut_short(before: int = 0) -> bool:
    """Tell whether this task is being cancelled from outside: by a scope around it, or asyncio's own way.

    Args:
        before: what ``cancellings`` said when the call in question began; older requests were swallowed by somebody.
    """
    try:
        if anyio.current_effective_deadline() == float("-inf"):
            return True
    except RuntimeError:  # no event loop any more: the coroutine is being closed
        return True
    return cancellings() > before


def failure_in(error: BaseException) -> Exception | None:
    """Return the failure in what a call raised without being cut short; None if it is an exit, which must go on.

    A cancellation that nobody asked for is a failure of the one who raised it.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        rest = group.split(Exception)[1]
        if rest is not None and rest.split(anyio.get_cancelled_exc_class())[1] is not None:
            return None
        failures = group.subgroup(Exception)
        if isinstance(failures, Exception):
            return failures
    elif not isinstance(error, anyio.get_cancelled_exc_class()):
        return None
    failure = RuntimeError("the handler raised a cancellation that nobody had asked for")
    failure.__cause__ = error
    return failure


@coroutine
def isolated(call: Callable[[], Coroutine[Any, Any, T]]) -> Generator[Any, Any, T]:
    """Await a call in this task, but in a copy of its context: what it sets does not leak.

    Stepping a coroutine inside another ``Context`` keeps its task, so cancel scopes, locks and timeouts work as
    usual; only its context variables are its own.
    """
    context = copy_context()
    steps = context.run(call)
    step: Callable[[Any], Any] = steps.send
    value: Any = None
    try:
        while True:
            yielded = context.run(step, value)
            try:
                step, value = steps.send, (yield yielded)
            except GeneratorExit:
                raise
            except BaseException as error:
                step, value = steps.throw, error
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        context.run(steps.close)
