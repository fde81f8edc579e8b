"""Open what a handler asks for, call it, and close what was opened: compiled once per handler.

Every ``yield`` dependency is a generator stepped by hand. The open ones of a handling stand in one list and are left
in the reverse order whatever fails; those of ``scope="function"`` are opened last, hence left first.
"""

import operator
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutine
from threading import Lock
from typing import Any

from anyio import CancelScope, CapacityLimiter, current_effective_deadline, current_time, get_cancelled_exc_class
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

from eventbus.context import Context
from eventbus.errors import WiringError
from eventbus.parameters import BUS, CONTEXT, FIRST, MESSAGE, TRANSACTION, Node, Plan, draw
from eventbus.store import Transaction

__all__ = ("Frame", "Injected", "close", "inject")

Overrides = Mapping[Callable[..., Any], Callable[..., Any]]
Run = Callable[..., Coroutine[Any, Any, Any]]
Bare = Callable[[Any], Coroutine[Any, Any, Any]]
Call = Callable[[Any, "Frame"], Awaitable[Any]]

CLEAN_UP = 5.0
"""Seconds that closing may take after a cancellation."""
THREADS = 40
"""Handlers and dependencies in worker threads at once; FastAPI counts its own threads apart."""

_NOTHING: Any = object()
_OFFERED = {CONTEXT: "context", BUS: "bus", TRANSACTION: "transaction"}

_places: RunVar[CapacityLimiter] = RunVar("eventbus_threads")
_loan: ContextVar[Sequence[bool]] = ContextVar("eventbus_loan", default=())


def inject(func: Callable[..., Any], *, where: str, bus_type: type, overrides: Overrides) -> "Injected":
    """Return what calls a handler with everything that it asks for.

    Its first parameter takes the message and is not looked at. ``where``, such as ``handler orders.place``, begins
    every fault. ``overrides`` may change at any time.
    """

    def drawn(under: Overrides) -> Plan:
        return draw(func, where=where, bus_type=bus_type, overrides=under)

    plan = drawn({})
    now = drawn(overrides) if overrides and plan.overridden else plan
    return Injected(
        call=_compile(plan, overrides, _overridden(where, overrides, drawn)),
        quick=_quick(plan, overrides),
        plain=plan.handler.shape == "coroutine" and plan.handler.places == (MESSAGE,) and not plan.faults,
        needs_context=CONTEXT in plan.wanted | now.wanted,
        transactions=tuple(dict.fromkeys((*plan.transactions, *now.transactions))),
        threaded=plan.handler.shape == "thread",
        faults=now.faults,
    )


def close(frame: "Frame", error: BaseException | None) -> Awaitable[None]:
    """Close what a handling left open, in the task and within the cancel scopes in which the handler was called.

    ``error``, what the handling ended with, is thrown into every dependency. Raises what one raised in its place.
    """
    return _leave(frame.exits, 0, error)


def _compile(plan: Plan, overrides: Overrides, otherwise: Call) -> Call:
    """Return the quickest call that does what a plan says, and ``otherwise`` while there are overrides."""
    if plan.faults:
        return otherwise
    if plan.handler.shape == "coroutine" and plan.handler.places[:1] == (MESSAGE,) and not plan.nodes:
        return _direct(plan.handler.call, plan.handler.places[1:])
    return _stepped(plan, overrides, otherwise)


def _stepped(plan: Plan, overrides: Overrides, otherwise: Call) -> Call:
    """Return the call that makes one value after the other."""
    handler, nodes = plan.handler, plan.nodes
    early, late = plan.parts()
    steps = [(FIRST + i, _run(nodes[i]), nodes[i].picker(), nodes[i]) for i in (*early, *late)]
    turn = FIRST + late[0] if late else 0
    handle, pick = _run(handler), handler.picker()
    blank = [None] * len(nodes)

    async def call(message: Any, frame: Frame) -> Any:
        if overrides and nodes:
            return await otherwise(message, frame)
        exits, floor = frame.exits, sys.maxsize
        values = [message, frame.context, frame.bus, frame.transaction, *blank]
        try:
            for place, run, picked, node in steps:
                if place == turn:
                    floor = len(exits)
                if not node.opens:
                    values[place] = await run(*picked(values))
                    continue
                if node.scopes:
                    exits.append(CancelScope().__enter__())
                generator = run(*picked(values))
                exits.append(generator)
                value = values[place] = await anext(generator, _NOTHING)
                if value is _NOTHING:
                    raise RuntimeError(f"dependency {node.name} did not yield: it has to yield exactly once")
            result = await handle(*pick(values))
        except BaseException as error:
            if len(exits) > floor:
                await _leave(exits, floor, error)
            raise
        if len(exits) > floor:
            await _leave(exits, floor, None)
        return result

    return call


def _overridden(where: str, overrides: Overrides, drawn: Callable[[Overrides], Plan]) -> Call:
    """Return the call under the overrides of the moment; the latest plan serves until they change."""
    latest: tuple[Plan, Call] | None = None

    async def call(message: Any, frame: Frame) -> Any:
        nonlocal latest
        if latest is None or latest[0].under(overrides) != latest[0].overridden:
            plan = drawn(overrides)
            latest = plan, _compile(plan, {}, call)
        plan, inner = latest
        faults = plan.faults
        if not faults and TRANSACTION in plan.wanted and frame.transaction is None:
            faults = (f"{where}: an override asks for a Transaction: let the handler take one as well",)
        if faults:
            raise WiringError(faults)
        return await inner(message, frame)

    return call


def _direct(func: Run, places: tuple[int, ...]) -> Call:
    """Return the call of a coroutine function that asks for nothing but what the frame offers."""
    if not places:
        return lambda message, _: func(message)
    get = operator.attrgetter(*(_OFFERED[place] for place in places))
    if len(places) == 1:
        return lambda message, frame: func(message, get(frame))
    return lambda message, frame: func(message, *get(frame))


def _quick(plan: Plan, overrides: Overrides) -> Callable[[Bare], Bare] | None:
    """Return what makes a call of the message alone, if one is enough but while things are not as usual."""
    if plan.faults or plan.handler.shape != "coroutine":
        return None
    func, places = plan.handler.call, plan.handler.places
    if places == (MESSAGE,) and not plan.nodes:
        return lambda _: func
    if places == (MESSAGE, FIRST) and [node.shape for node in plan.nodes] == ["cached"]:
        return lambda otherwise: _with_cached(func, plan.nodes[0].call, overrides, otherwise)
    return None


def _with_cached(func: Run, cached: Callable[[], Any], overrides: Overrides, otherwise: Bare) -> Bare:
    """Return the call of a coroutine function with one dependency, whose value ``lru_cache`` keeps."""
    look: Any = None  # still cold: calling it fails

    async def warm(message: Any) -> Any:
        nonlocal look
        result = await otherwise(message)
        look = cached
        return result

    def call(message: Any) -> Coroutine[Any, Any, Any]:
        if overrides:
            return otherwise(message)
        try:
            value = look()
        except Exception:  # it is cold, or its cache was cleared and now it fails: let it fail where it is awaited
            return warm(message)
        return func(message, value)

    return call


def _run(node: Node) -> Callable[..., Any]:
    """Return what makes the value of a node: an awaitable, or a generator that it is got from."""
    if node.shape == "cached":
        return _first_in_thread(node.call)
    if node.shape == "thread":
        return partial(_in_thread, node.call)
    if node.shape == "gen":
        return lambda *values: _Threaded(node.call(*values), node.name)
    return node.call


def _first_in_thread(call: Callable[[], Any]) -> Run:
    """Return what calls a function behind ``lru_cache``, which returns at once when it has been called."""
    warm = False

    async def look() -> Any:
        nonlocal warm
        value = call() if warm else await _in_thread(call)
        warm = True
        return value

    return look


async def _in_thread(call: Callable[..., Any], *values: Any) -> Any:
    return await run_sync(_lend, call, values, limiter=_limiter())


def _lend(call: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    loan = [True]
    _loan.set(loan)
    try:
        result = call(*values)
    finally:
        loan.clear()
    if iscoroutine(result):
        result.close()
        raise TypeError(f"{call!r} is a plain def that returned a coroutine, which nobody awaits: make it async def")
    return result


def _limiter() -> CapacityLimiter:
    """Return what counts threads; whoever a thread waits for has its place, or all might wait for ever."""
    if _loan.get():
        return CapacityLimiter(1)
    limiter = _places.get(None)
    if limiter is None:
        limiter = CapacityLimiter(THREADS)
        _places.set(limiter)
    return limiter


async def _leave(exits: list[Any], floor: int, error: BaseException | None) -> None:
    """Leave what was opened last first, down to ``floor``; raise what took the place of ``error``."""
    first, until = error, 0.0
    while len(exits) > floor:
        opened = exits.pop()
        try:
            if isinstance(opened, CancelScope):
                opened.__exit__(None, None, None)
            elif error is None:
                if await anext(opened, _NOTHING) is not _NOTHING:
                    await _stop(opened)
            elif until or current_effective_deadline() <= current_time():
                until = until or current_time() + CLEAN_UP
                error = await _end_shielded(exits, opened, error, until)
            else:
                error = await _end(opened, error)
        except BaseException as raised:
            error = _after(error, raised)
    if error is not None and error is not first:
        _raise(error)


async def _end_shielded(exits: list[Any], generator: Any, error: BaseException, until: float) -> BaseException:
    """End a generator although its handling is cancelled, but not for longer than ``until``."""
    guard = exits[-1] if exits and isinstance(exits[-1], CancelScope) else None
    scope = guard or CancelScope()
    scope.shield, scope.deadline, ended = True, until, error
    with scope if guard is None else nullcontext():
        ended = await _end(generator, error)
    return error if scope.cancel_called and isinstance(ended, get_cancelled_exc_class()) else ended


async def _end(generator: Any, error: BaseException) -> BaseException:
    """Let a generator end after ``error``; return the error that goes on."""
    if getattr(generator, "ag_frame", generator) is None:
        return error  # it was over before it had opened
    trace = error.__traceback__
    try:
        await generator.athrow(error)
        await _stop(generator)
    except StopAsyncIteration:
        return error
    except BaseException as raised:
        disguised = isinstance(error, StopIteration | StopAsyncIteration) and raised.__cause__ is error
        return error if disguised and isinstance(raised, RuntimeError) else _after(error, raised)
    finally:
        error.__traceback__ = trace
    return error


async def _stop(generator: Any) -> None:
    await generator.aclose()
    raise RuntimeError(f"dependency {generator.__name__} yields more than once: it has to yield exactly once")


def _raise(error: BaseException) -> None:
    """Raise an error that has been raised before, without forgetting what led to it."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context


def _after(error: BaseException | None, raised: BaseException) -> BaseException:
    """Return ``raised``, knowing that it came of ``error``."""
    if raised is not error and raised.__context__ is None and (error is None or error.__context__ is not raised):
        raised.__context__ = error
    return raised


class Frame:
    """Hold what one handling offers to its handler, and what is open in it."""

    __slots__ = ("bus", "context", "exits", "transaction")

    def __init__(
        self, context: Context | None = None, bus: object = None, transaction: Transaction[Any] | None = None
    ) -> None:
        self.context = context
        self.bus = bus
        self.transaction = transaction
        self.exits: list[Any] = []  # generators, and the cancel scope entered before the first that may hold one


@dataclass(frozen=True, slots=True)
class Injected:
    """Hold how a handler is called, and what it and the dependencies below it ask for."""

    call: Call
    """``await call(message, frame)`` returns what the handler returned."""
    quick: Callable[[Bare], Bare] | None
    """``quick(otherwise)`` makes a call of the message alone, which does ``otherwise(message)`` while it cannot."""
    plain: bool
    """A coroutine function that takes the message only: ``await func(message)`` does the same."""
    needs_context: bool
    transactions: tuple[Any, ...]
    """Every S of a ``Transaction[S]``, ``Any`` for a bare one."""
    threaded: bool
    """The handler is a plain ``def`` and runs in a worker thread."""
    faults: tuple[str, ...]


class _Threaded:
    """Step a generator in worker threads as if it were async.

    asyncio's own cancellation goes through shields and leaves a running thread behind: hence the lock and the loop.
    """

    def __init__(self, generator: Generator[Any, Any, Any], name: str) -> None:
        self.__name__ = name
        self._generator = generator
        self._lock = Lock()
        self._begun = False

    async def __anext__(self) -> Any:
        step = partial(next, self._generator)
        if self._begun:
            return await self._surely(step)
        self._begun = True
        answer = Future[Any]()
        await _in_thread(self._step, step, answer)
        return answer.result()

    async def athrow(self, error: BaseException) -> Any:
        return await self._surely(partial(self._generator.throw, error), waiting=not isinstance(error, GeneratorExit))

    async def aclose(self) -> None:
        await self._surely(self._generator.close)

    async def _surely(self, step: Callable[[], Any], *, waiting: bool = True) -> Any:
        answer, cancelled = Future[Any](), None
        while waiting:  # a coroutine that is itself being closed must not
            try:
                with CancelScope(shield=True):
                    await run_sync(_lend, self._step, (step, answer), limiter=CapacityLimiter(1))
                waiting = False
            except get_cancelled_exc_class() as raised:
                cancelled = raised
        self._step(step, answer)
        error = cancelled or answer.exception()
        return answer.result() if error is None else _raise(error)

    def _step(self, step: Callable[[], Any], answer: Future[Any]) -> None:
        with self._lock:
            if not answer.done():
                try:
                    answer.set_result(step())
                except StopIteration:
                    answer.set_exception(StopAsyncIteration())
                except BaseException as error:
                    answer.set_exception(error)
