"""Run the handlers of one event side by side, each in a context of its own, and collect what fails.

What is promised: every call runs and finishes, whatever its siblings do, as if each were a child of one task group
that collects errors. Only what is no ``Exception`` (``KeyboardInterrupt``, ``SystemExit``) and a cancellation from
outside end the group early.

How, and why it is safe. Starting a task is what makes a group dear, and most handlers of one event need none, since
they finish without ever suspending. So the calls are stepped one after the other inside the task group, each in a
copy of the context, and:

1. A call that returns or raises at its first step is over. It has needed no task.
2. The first that suspends stays where it began, in the publisher's task, which resumes it until it is over. One
   child goes on with the calls behind it in the same way.
3. If one suspends there as well, suspending is the rule for this event: the rest get a child each, and the next
   few times every call behind the first that suspends gets its child at once.

No call ever changes its task, not even between its first step and its second. That is what cancel scopes, locks,
``asyncio.timeout`` and trio build on, and why a call must not be begun in one task and finished in another. The group
is entered before the first step, so that whatever scope a call opens lies inside the group's, never across it; every
call therefore sees the publisher's deadline, its shields and its cancellation. What a call sets in its context is its
own, because each step runs inside the call's own copy.

What follows for handlers: they begin in the order of their registration, up to the second that suspends. The task
that those before the first child see as current is the publisher's: to cancel it natively is to cancel the publisher.
"""

import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextvars import Context, copy_context
from types import coroutine
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

__all__ = ("FanOut", "cancellings", "cut_short", "failure_in", "isolated")

LOOK_AGAIN = 16
"""Fan-outs for which it is taken for granted that what suspended the last time does so again."""

A = TypeVar("A")
T = TypeVar("T")
Call = Callable[[A], Coroutine[Any, Any, Any]]
Failures = dict[int, BaseException]


class FanOut(Generic[A]):
    """Be the calls that are made side by side whenever an event of one type is published."""

    __slots__ = ("_calls", "_left")

    def __init__(self, calls: Sequence[Call[A]]) -> None:
        self._calls = calls
        self._left = 0

    async def run(self, argument: A) -> Failures:
        """Call all with one argument, concurrently; return what the failed ones raised, by their places.

        A cancellation from outside goes on; the calls see it too.
        """
        failures: Failures = {}
        before = cancellings()
        if before:
            await checkpoint()  # a request not yet delivered arrives here; what is older, somebody swallowed
        if len(self._calls) < 2:
            await _Run(self._calls, argument, failures, before, None).lane(0)
            return failures
        group = anyio.create_task_group()
        self._left -= 1
        run = _Run(self._calls, argument, failures, before, group, self._left > 0)
        async with group:
            await run.lane(0)
        if run.many:
            self._left = LOOK_AGAIN
        return failures


class _Run(Generic[A]):
    """Be one fan-out, as the tasks that take part in it share it; one call alone needs no group."""

    __slots__ = ("argument", "before", "calls", "failures", "group", "many", "spread")

    def __init__(
        self, calls: Sequence[Call[A]], argument: A, failures: Failures, before: int, group: TaskGroup | None,
        spread: bool = False,
    ) -> None:  # fmt: skip
        self.calls = calls
        self.argument = argument
        self.failures = failures
        self.before = before
        """What ``cancellings`` said in the publisher's task before the first call."""
        self.group = group
        self.spread = spread
        self.many = False
        """Whether more than one has been seen to suspend."""

    async def lane(self, first: int) -> None:
        """Step the calls from ``first`` on until one suspends; hand the rest over and see that one to its end."""
        calls, argument = self.calls, self.argument
        for index in range(first, len(calls)):
            context, resumed = copy_context(), None
            try:
                steps = context.run(calls[index], argument)
                resumed = _resumption(steps, context, context.run(steps.send, None))
            except StopIteration:
                resumed = None
            except BaseException as error:
                if not self.fails(index, error):
                    return
            if resumed is not None:
                self.many = first > 0
                self.hand_over(index + 1)
                await (self.finish if first else self.finish_here)(index, resumed)
                return

    def hand_over(self, rest: int) -> None:
        """Start what runs the calls from ``rest`` on: a child for each if suspending is the rule, or one for all."""
        if self.group is None or rest == len(self.calls):
            return
        if not (self.many or self.spread):
            self.group.start_soon(self.lane, rest)
        else:
            for index in range(rest, len(self.calls)):
                self.group.start_soon(self.finish, index, None)

    async def finish_here(self, index: int, resumed: Awaitable[Any]) -> None:
        """See a call to its end in the publisher's task.

        A cancellation arrives inside the call, asyncio's own only once: whatever the call makes of it, it was for the
        publisher.
        """
        try:
            await resumed
        except BaseException as error:
            if not isinstance(error, Exception) and cancellings() > self.before:
                raise
            self.fails(index, error)
        if cancellings() > self.before:
            await checkpoint_if_cancelled()
            raise anyio.get_cancelled_exc_class()

    async def finish(self, index: int, resumed: Awaitable[Any] | None) -> None:
        """See a call to its end in a child; one that has not begun has the child's context for its own."""
        try:
            await (self.calls[index](self.argument) if resumed is None else resumed)
        except BaseException as error:
            self.fails(index, error)

    def fails(self, index: int, error: BaseException) -> bool:
        """Keep what a call raised, and end its siblings if it is an exit; tell whether others may still begin.

        Raises it again if it is the cancellation of the task.
        """
        if isinstance(error, Exception):
            self.failures[index] = error
            return True
        if isinstance(error, GeneratorExit) or _cancelled():  # it is being closed, or cancelled
            raise error
        failure = failure_in(error)
        self.failures[index] = failure or error
        if failure is None and self.group is not None:
            self.group.cancel_scope.cancel()
        return failure is not None


def cancellings() -> int:
    """Return how often somebody has asked asyncio to cancel this task and not taken it back."""
    asyncio = sys.modules.get("asyncio")  # whoever runs on it has imported it, and it takes its time
    try:
        task = None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # not asyncio
        return 0
    return 0 if task is None else task.cancelling()


def cut_short(before: int = 0) -> bool:
    """Tell whether this task is being cancelled from outside: by a scope around it, or asyncio's own way.

    Args:
        before: what ``cancellings`` said when the call in question began; older requests were swallowed by somebody.
    """
    return _cancelled() or cancellings() > before


def _cancelled() -> bool:
    """Tell whether a scope around this task is cancelled; without an event loop its coroutine is being closed."""
    try:
        return anyio.current_effective_deadline() == float("-inf")
    except RuntimeError:
        return True


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
    try:
        yielded = context.run(steps.send, None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    return (yield from _resumed(steps, context, yielded))


def _resumed(steps: Coroutine[Any, Any, T], context: Context, yielded: Any) -> Generator[Any, Any, T]:
    """Go on with a call that has suspended, forwarding what it yields and what comes back."""
    step: Callable[[Any], Any] = steps.send
    try:
        while True:
            try:
                step, value = steps.send, (yield yielded)
            except GeneratorExit:
                raise
            except BaseException as error:
                step, value = steps.throw, error
            yielded = context.run(step, value)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        context.run(steps.close)


_resumption = coroutine(_resumed)
