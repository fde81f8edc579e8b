"""One handler as one call: middleware, limits, transaction and dependencies around it, compiled once."""

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, cast

import anyio
from anyio.lowlevel import RunVar

from eventbus.clock import Runtime
from eventbus.context import Context, Seed, current, follow
from eventbus.errors import HandlerTimeoutError, QueueFullError, SettleError, StoreError
from eventbus.inject import Frame, close
from eventbus.middleware import CallNext, chain
from eventbus.registry import Known
from eventbus.store import Transaction, Unit

__all__ = ("Claim", "Invoker", "Lapse", "Surroundings", "UnbegunError")

log = logging.getLogger("eventbus")

BLOCKED = (
    "handler %r returned after %.3g s, past its timeout of %g s, and could not be stopped: it seems to block the event "
    "loop; write it as `def`, which runs in a thread, or call what blocks by anyio.to_thread.run_sync"
)

_holding: ContextVar[tuple["_Slot", ...]] = ContextVar("eventbus_holding", default=())
_number = count()


class Claim(Protocol):
    """Be the right to settle one entry, exercised inside the handler's own transaction."""

    async def lock(self, unit: Unit) -> bool:
        """Take the row lock of the entry; False if the lease is lost."""
        ...

    async def settle(self, unit: Unit, transaction: Transaction[Any]) -> bool:
        """Write "done" in the transaction; False if the lease is lost."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Hold what an invoker needs from the bus around it."""

    bus: object
    runtime: Runtime
    transaction: Callable[[], AbstractAsyncContextManager[Transaction[Any]]]
    """Opens a transaction, or joins the open one by a savepoint."""
    unit: Callable[[], Unit]
    """Returns the open transaction as the store has it."""
    flush: Callable[[], Awaitable[None]]
    """Writes what was published in a transaction so far."""
    follow: Callable[[Iterable[object]], Awaitable[None]]
    """Publishes what a handler returned."""


class Lapse(Exception):  # noqa: N818 - never seen outside the engine
    """Say that the store failed around a handler, a commit with unknown outcome included: the lease decides."""


class UnbegunError(HandlerTimeoutError):
    """Say that a handler's time was over before its transaction had begun: others held the database."""


class Handling(Context):
    """Be the context of a handler whose transaction also settles its entry."""

    __slots__ = ("begun", "claim")

    def __init__(self, seed: Seed, handler: str, attempt: int, claim: Claim) -> None:
        super().__init__(seed, handler, attempt)
        self.claim = claim
        self.begun = False
        """Whether its transaction is open, so that what happens is the handler's own doing."""


class Invoker:
    """Call one handler; what it asks for is opened before and closed after."""

    __slots__ = ("_entry", "bare", "known", "quick", "transactional", "unlimited")

    def __init__(self, known: Known, around: Surroundings, limited: bool = True) -> None:
        self.known = known
        self.transactional = bool(known.injected.transactions)
        options = known.handler.options
        core = _core(known, around)
        if known.timeout is not None:
            core = _timed(core, known.handler.name, known.timeout, around.runtime)
        size = options.concurrency if limited else None
        self.unlimited = self if size is None else Invoker(known, around, limited=False)
        """The same for who lets no more of it run at once than its concurrency, and is the only one to call it."""
        if size is not None:
            core = _limited(core, known.handler.name, size)
        self._entry = chain(known.middleware, core)
        alone = not (known.middleware or known.returns or known.timeout or size)
        self.bare: Callable[[Any], Coroutine[Any, Any, Any]] | None = (
            known.handler.func if alone and known.injected.plain else None
        )
        """The handler itself, when nothing has to happen around it."""
        self.quick = known.injected.quick if alone else None
        """Makes a call of the message alone out of one that does everything, when that is enough."""

    async def run(self, seed: Seed, attempt: int = 1, claim: Claim | None = None) -> Any:
        """Handle the message of ``seed``; return what the handler returned, raise what it raised."""
        token = current.set(seed)
        try:
            if self.bare is not None:
                return await self.bare(seed[0])
            name = self.known.handler.name
            ctx = Context(seed, name, attempt) if claim is None else Handling(seed, name, attempt, claim)
            return await self._entry(ctx)
        finally:
            current.reset(token)

    def sender(self, runtime: Runtime) -> Callable[[Any], Coroutine[Any, Any, Any]]:
        """Return what handles a command that is sent: as ``run``, made for what this handler needs and no more."""
        bare, name, entry = self.bare, self.known.handler.name, self._entry
        get, put, back = current.get, current.set, current.reset

        async def send_bare(command: Any) -> Any:
            cause = get()
            token = put([command, None, None, 0, runtime] if cause is None else follow(command, cause, runtime))
            try:
                return await call(command)
            finally:
                back(token)

        async def send(command: Any) -> Any:
            cause = get()
            seed = [command, None, None, 0, runtime] if cause is None else follow(command, cause, runtime)
            token = put(seed)
            try:
                return await entry(Context(seed, name))
            finally:
                back(token)

        if bare is None:
            return send
        call = bare
        return send_bare


def _core(known: Known, around: Surroundings) -> CallNext:
    injected, returns = known.injected, known.returns

    if injected.plain and not returns:
        func = known.handler.func
        return lambda ctx: func(ctx.message)

    bus, call, follow_up = around.bus, injected.call, around.follow

    async def handle(ctx: Context, opened: Frame | None = None) -> Any:
        frame = Frame(ctx, bus) if opened is None else opened
        try:
            result: Any = await call(ctx.message, frame)
            if returns and result is not None:
                await follow_up(_listed(result))
        except BaseException as error:
            if frame.exits:
                await close(frame, error)
            raise
        if opened is None and frame.exits:
            await close(frame, None)
        return result

    return _in_transaction(handle, around) if injected.transactions else handle


def _listed(result: object) -> Sequence[object]:
    return cast("Sequence[object]", result) if isinstance(result, list | tuple) else (result,)


def _in_transaction(handle: Callable[[Context, Frame], Awaitable[Any]], around: Surroundings) -> CallNext:
    async def in_transaction(ctx: Context) -> Any:
        claim = ctx.claim if isinstance(ctx, Handling) else None
        result: Any = None
        frame: Frame | None = None
        settled: Transaction[Any] | None = None
        handling = False
        try:
            async with around.transaction() as transaction:
                unit = around.unit()
                if claim is not None and not await claim.lock(unit):
                    raise SettleError("the lease was lost before the handler started")
                if isinstance(ctx, Handling):
                    ctx.begun = True
                opened, handling = Frame(ctx, around.bus, transaction), True
                result, frame = await handle(ctx, opened), opened
                handling = False
                if claim is not None:
                    await around.flush()
                    if not await claim.settle(unit, transaction):
                        raise SettleError("the lease was lost while the handler ran")
                    settled = transaction
        except BaseException as error:
            if frame is not None:
                await close(frame, error)
            if claim is not None and settled is None and isinstance(error, StoreError) and not handling:
                raise Lapse from error  # the store failed, not the handler
            if settled is None or not isinstance(error, Exception):
                raise
            if not settled.committed:
                raise Lapse from error
            log.exception("%s is done, but what was to follow its commit failed", ctx.handler)
            return result
        await close(frame, None)
        return result

    return in_transaction


def _timed(call: CallNext, name: str, seconds: float, runtime: Runtime) -> CallNext:
    async def timed(ctx: Context) -> Any:
        began = runtime.clock.monotonic()
        with runtime.clock.move_on_after(seconds):
            result = await call(ctx)
            if (took := runtime.clock.monotonic() - began) > seconds:
                log.warning(BLOCKED, name, took, seconds)
            return result
        unbegun = isinstance(ctx, Handling) and not ctx.begun
        raise (UnbegunError if unbegun else HandlerTimeoutError)(name, seconds)

    return timed


class _Slots:
    """Be the concurrency of one handler in one event loop."""

    __slots__ = ("free", "taken")

    def __init__(self, size: int) -> None:
        self.free = anyio.Semaphore(size, fast_acquire=True)
        self.taken: list[_Slot] = []

    def stuck(self, holding: tuple["_Slot", ...], seen: list["_Slots"]) -> bool:
        """Tell whether none comes free before one who is ``holding`` others goes on."""
        if self in seen:
            return True
        seen.append(self)
        return self.free.value == 0 and all(
            slot in holding or any(wanted.stuck(holding, seen) for wanted in slot.wants) for slot in self.taken
        )


class _Slot:
    """Be one of them in use, with what is waited for by whoever runs in it."""

    __slots__ = ("wants",)

    def __init__(self) -> None:
        self.wants: list[_Slots] = []


def _limited(call: CallNext, name: str, size: int) -> CallNext:
    here: RunVar[_Slots] = RunVar(f"eventbus:{next(_number)}:{name}")

    async def limited(ctx: Context) -> Any:
        slots, holding = here.get(None), _holding.get()
        if slots is None:
            slots = _Slots(size)
            here.set(slots)
        if holding and slots.stuck(holding, []):
            raise QueueFullError(name, size, "those who hold its concurrency slots wait for the caller")
        for held in holding:
            held.wants.append(slots)
        try:
            await slots.free.acquire()
        finally:
            for held in holding:
                held.wants.remove(slots)
        slot = _Slot()
        slots.taken.append(slot)
        token = _holding.set((*holding, slot))
        try:
            return await call(ctx)
        finally:
            _holding.reset(token)
            slots.taken.remove(slot)
            slots.free.release()

    return limited
