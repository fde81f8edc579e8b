"""Parameters are read once, dependencies opened once and closed once, in reverse order, whatever fails."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar, cast
from unittest.mock import AsyncMock

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
from fastapi import BackgroundTasks, Depends, Header, Query, Request, Response, Security, WebSocket
from fastapi.security import OAuth2PasswordBearer, SecurityScopes
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypeAliasType

import eventbus.inject
from eventbus import Context, Event
from eventbus.errors import WiringError
from eventbus.inject import Frame, Injected, close, inject
from eventbus.store import Transaction

if TYPE_CHECKING:
    from decimal import Decimal

Overrides = Mapping[Callable[..., Any], Callable[..., Any]]
Opened = Generator[str, Any, None]


class EventBus:
    """Stand in for the bus: its type is an argument of ``inject``."""


S = TypeVar("S")


class Session:
    """Stand in for what a store works with."""


class Ping(Event):
    """Be a message."""


class Oops(Exception):  # noqa: N818 - it is one
    """Be a failure of a user's code."""


BUS = EventBus()
TX: Transaction[Any] = Transaction(cast("Any", None))


def injected(func: Callable[..., Any], overrides: Overrides | None = None, **kwargs: Any) -> Injected:
    """Compile a handler that the tests call ``orders.place``."""
    given = {} if overrides is None else overrides
    return inject(func, where="handler orders.place", bus_type=EventBus, overrides=given, **kwargs)


async def handle(one: Injected, message: Any = "m", log: list[str] | None = None, frame: Frame | None = None) -> Any:
    """Handle a message as the engine does: call, commit, close."""
    frame = frame or Frame(Context.of(Ping()), BUS, TX)
    try:
        result = await one.call(message, frame)
        if log is not None:
            log.append("commit")
    except BaseException as error:
        await close(frame, error)
        raise
    await close(frame, None)
    return result


async def run(func: Callable[..., Any], log: list[str] | None = None, overrides: Overrides | None = None) -> Any:
    """Compile and handle."""
    one = injected(func, overrides)
    assert one.faults == ()
    return await handle(one, log=log)


def one() -> int:
    return 1


async def aone() -> int:
    return 1


# ---- parameters


class Stock:
    def __init__(self, count: int = 7) -> None:
        self.count = count


async def by_context(m: str, ctx: Context) -> object:
    return isinstance(ctx, Context)


async def by_context_or_none(m: str, ctx: Context | None = None) -> object:
    return isinstance(ctx, Context)


async def by_bus(m: str, bus: EventBus) -> object:
    return bus is BUS


async def by_bus_text(m: str, bus: "EventBus") -> object:
    return bus is BUS


async def by_transaction(m: str, tx: Transaction[Session]) -> object:
    return tx is TX


async def by_bare_transaction(m: str, tx: "Transaction") -> object:  # type: ignore[type-arg]
    return tx is TX


async def by_all(m: str, ctx: Context, bus: EventBus, tx: Transaction[Session]) -> object:
    return isinstance(ctx, Context) and bus is BUS and tx is TX


async def by_annotated(m: str, x: Annotated[int, Depends(one)]) -> object:
    return x == 1


async def by_annotated_text(m: str, x: "Annotated[int, Depends(one)]") -> object:
    return x == 1


async def by_annotated_unknown(m: str, x: Annotated["Decimal", Depends(one)]) -> object:
    return x == 1


Alias = TypeAliasType("Alias", Annotated[int, Depends(one)])


async def by_alias(m: str, x: Alias) -> object:
    return x == 1


async def by_default(m: str, x: "Decimal" = Depends(one)) -> object:  # noqa: B008
    return x == 1


async def by_class(m: str, x: Annotated[Stock, Depends()]) -> object:
    return x.count == 7


async def by_class_default(m: str, x: Stock = Depends()) -> object:  # noqa: B008
    return x.count == 7


async def by_own_default(m: str, limit: int = 3, ctx: Context | None = None) -> object:
    return limit == 3 and ctx is not None


async def by_name(m: str, *rest: Any, ctx: Context, x: Annotated[int, Depends(one)], **more: Any) -> object:
    return isinstance(ctx, Context) and x == 1 and not rest and not more


async def by_position(m: str, ctx: Context, x: Annotated[int, Depends(one)], /) -> object:
    return isinstance(ctx, Context) and x == 1


def by_thread(m: str, ctx: Context, *, x: Annotated[int, Depends(aone)]) -> object:
    return isinstance(ctx, Context) and x == 1 and threading.current_thread() is not threading.main_thread()


@pytest.mark.parametrize(
    "func",
    [
        *(by_context, by_context_or_none, by_bus, by_bus_text, by_transaction, by_bare_transaction, by_all),
        *(by_annotated, by_annotated_text, by_annotated_unknown, by_alias, by_default, by_class, by_class_default),
        *(by_own_default, by_name, by_position, by_thread),
    ],
)
async def test_parameter(func: Callable[..., Any]) -> None:
    """Every documented kind of parameter gets its value."""
    assert await run(func) is True


async def test_bus_by_name_only() -> None:
    """A bus that is imported for type checkers only is known by its name, also behind a module."""

    async def handler(m: str, bus: "missing.EventBus") -> object:  # type: ignore[name-defined]  # noqa: F821
        return bus

    assert await run(handler) is BUS


async def test_closure_annotation() -> None:
    """Names of the enclosing function are known in annotations."""

    class Local:
        pass

    async def handler(m: str, x: "Annotated[Local, Depends()]") -> object:
        return isinstance(x, Local)

    assert await run(handler) is True


async def test_bound_by_partial() -> None:
    """What a partial has bound by name stays bound."""
    ctx = Context.of(Ping())

    async def handler(m: str, ctx: Context, bus: EventBus, x: int) -> tuple[object, ...]:
        return ctx, bus, x

    assert await run(functools.partial(handler, ctx=ctx, x=1)) == (ctx, BUS, 1)


async def test_bus_of_a_subclass() -> None:
    """A parameter of the base class gets the bus; one of another class does not."""

    class OwnBus(EventBus):
        pass

    async def handler(m: str, bus: EventBus, own: OwnBus) -> bool:
        return bus is own is BUS

    found = inject(handler, where="handler orders.place", bus_type=OwnBus, overrides={})
    assert await handle(found) is True
    assert len(injected(handler).faults) == 1


def test_says_what_is_asked_for() -> None:
    """What the engine has to provide is collected from the whole tree."""

    def deep(ctx: Context, tx: Transaction[Session]) -> None: ...
    def middle(d: Annotated[None, Depends(deep)], bus: EventBus, tx: Transaction) -> None: ...  # type: ignore[type-arg]
    def handler(m: str, d: Annotated[None, Depends(middle)], tx: Transaction[S]) -> None: ...

    async def plain(m: str, limit: int = 3) -> None: ...

    found = injected(handler)
    assert (found.needs_context, found.transactions) == (True, (Session, Any))
    assert (found.threaded, found.plain, found.quick) == (True, False, None)
    found = injected(plain)
    assert (found.needs_context, found.transactions) == (False, ())
    assert (found.threaded, found.plain) == (False, True)
    assert found.quick is not None
    assert found.quick(cast("Any", None)) is plain
    assert injected(lambda m: None).plain is False


# ---- callables


class Maker:
    """Be callable in every way."""

    def __call__(self, ctx: Context) -> str:
        return "made"

    async def later(self, ctx: Context) -> str:
        return "made"

    @classmethod
    def of_class(cls, ctx: Context) -> str:
        return "made"

    @staticmethod
    async def static(ctx: Context) -> str:
        return "made"

    def yielding(self, ctx: Context) -> Iterator[str]:
        yield "made"


class LaterMaker:
    async def __call__(self, ctx: Context) -> str:
        return "made"


class YieldingMaker:
    async def __call__(self, ctx: Context) -> AsyncIterator[str]:
        yield "made"

    async def held(self) -> AsyncIterator[int]:
        with anyio.CancelScope():
            yield 1


class Made(str):
    __slots__ = ()

    def __new__(cls, ctx: "Context") -> Self:
        return super().__new__(cls, "made")


@dataclass
class Record:
    ctx: "Context"

    def __eq__(self, other: object) -> bool:
        return other == "made"

    __hash__ = None  # type: ignore[assignment]


class Endless:
    """Claim to have every attribute."""

    def __getattr__(self, name: str) -> "Endless":
        return Endless()

    def __repr__(self) -> str:
        return "Endless()"

    def __call__(self) -> str:
        return "made"


def wrapped(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    return wrapper


async def two(ctx: Context, what: str) -> str:
    return what


@functools.lru_cache
def kept() -> str:
    return "made"


CALLABLES: dict[str, Callable[..., Any]] = {
    "async def": LaterMaker.__call__.__get__(LaterMaker()),
    "lambda": lambda: "made",
    "class": Made,
    "partial of a class": functools.partial(Made),
    "dataclass": Record,
    "instance": Maker(),
    "async instance": LaterMaker(),
    "yielding instance": YieldingMaker(),
    "method": Maker().later,
    "yielding method": Maker().yielding,
    "class method": Maker.of_class,
    "static method": Maker.static,
    "static method object": Maker.__dict__["static"],
    "partial": functools.partial(two, what="made"),
    "partial of partial": functools.partial(functools.partial(two), what="made"),
    "wrapped async": wrapped(Maker().later),
    "wrapped generator": wrapped(Maker().yielding),
    "wrapped async generator": wrapped(YieldingMaker().__call__),
    "wrapped partial": wrapped(functools.partial(two, what="made")),
    "cached": kept,
    "mock": AsyncMock(return_value="made"),
}


@pytest.mark.parametrize("kind", CALLABLES)
async def test_dependency_kind(kind: str) -> None:
    """Everything that can be called can be a dependency, and gives its value."""

    async def handler(m: str, made: Annotated[str, Depends(CALLABLES[kind])]) -> str:
        return made

    assert await run(handler) == "made"


class Handlers:
    async def place(self, m: str, ctx: Context) -> str:
        return m

    def __call__(self, m: str, ctx: Context) -> str:
        return m


async def placed(first: int, m: str, ctx: Context, last: int) -> str:
    return m * first * last


@pytest.mark.parametrize(
    "func",
    [
        Handlers().place,
        Handlers(),
        functools.partial(placed, 1, last=1),
        wrapped(Handlers().place),
        functools.cache(lambda m: m),
        AsyncMock(side_effect=lambda m: m),
    ],
    ids=["method", "instance", "partial", "wrapped", "cached", "mock"],
)
async def test_handler_kind(func: Callable[..., Any]) -> None:
    """Everything that can be called, but a class or a generator, can be a handler."""
    assert await run(func) == "m"


# ---- faults


def of_request(request: Request) -> None: ...
def of_socket(socket: WebSocket | None = None) -> None: ...
def of_response(response: Response) -> None: ...
def of_tasks(tasks: BackgroundTasks) -> None: ...
def of_scopes(scopes: SecurityScopes) -> None: ...
def of_header(x: Annotated[str, Header()]) -> None: ...
def of_query(x: int = Query(3)) -> None: ...
def of_plain(x: int) -> None: ...
def of_request_below(d: Annotated[None, Depends(of_request)]) -> None: ...
def of_both(x: Annotated[int, Depends(one)] = Depends(one)) -> None: ...
def of_unknown(x: "Decimal" = 0) -> None: ...  # type: ignore[assignment]
def of_security(x: Annotated[int, Security(one)]) -> None: ...
def of_limited(x: Annotated[int, Depends(one, max_concurrency=1)]) -> None: ...
def of_nothing(x=Depends()) -> None: ...  # type: ignore[no-untyped-def]  # noqa: B008
def of_unknown_session(tx: Transaction["Decimal"]) -> None: ...
def circle_a(x: "Annotated[None, Depends(circle_b)]") -> None: ...
def circle_b(x: "Annotated[None, Depends(circle_a)]") -> None: ...


@asynccontextmanager
async def of_manager() -> AsyncIterator[int]:
    yield 1


@functools.cache
async def of_kept_coroutine() -> int:
    return 1


async def short() -> AsyncIterator[int]:
    yield 1


async def of_short(x: Annotated[int, Depends(short, scope="function")]) -> AsyncIterator[int]:
    yield x


async def between(x: Annotated[int, Depends(short, scope="function")]) -> int:
    return x


async def of_between(x: Annotated[int, Depends(between)]) -> AsyncIterator[int]:
    yield x


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self) -> int:
        return 1


FAULTS: dict[Callable[..., Any], str] = {
    of_request: "parameter 'request' asks for Request, and outside a request there is none: pass the value in the",
    of_socket: "parameter 'socket' asks for WebSocket, and",
    of_response: "asks for Response",
    of_tasks: "asks for BackgroundTasks",
    of_scopes: "asks for SecurityScopes",
    of_header: "parameter 'x' asks for Header(...), and outside a request there is none",
    of_query: "asks for Query(...)",
    of_security: "asks for Security(...), which guards requests",
    of_plain: "parameter 'x' would be read from the HTTP request, and outside a request there is none: pass the",
    of_request_below: "dependency of_request_below > of_request: parameter 'request' asks for Request",
    OAuth2PasswordBearer("token"): "dependency OAuth2PasswordBearer: parameter 'request' asks for HTTPConnection",
    of_both: "has a marker in Annotated and another as its default",
    of_unknown: "'Decimal', which means nothing here (name 'Decimal' is not defined): import it at run time",
    of_unknown_session: "import it at run time",
    of_limited: "limits max_concurrency, which the bus does not count",
    of_nothing: "say Depends(f) with something that can be called",
    circle_a: "dependency circle_a > circle_b > circle_a: goes round in a circle",
    of_manager: "is a context manager: take the decorator off",
    of_kept_coroutine: "in a cache, whose result can be used once only",
    of_short: 'cannot depend on one of scope="function"',
    of_between: 'cannot depend on one of scope="function"',
    dict: "its signature cannot be read",
    Endless(): "its signature cannot be read",
}


@pytest.mark.parametrize("dependency", FAULTS, ids=lambda one: getattr(one, "__name__", "instance"))
async def test_dependency_fault(dependency: Callable[..., Any]) -> None:
    """What a dependency cannot have is one sentence with the handler, the way to it and the cure."""

    async def handler(m: str, x: Annotated[Any, Depends(dependency)]) -> None: ...

    found = injected(handler)
    assert len(found.faults) == 1
    assert found.faults[0].startswith("handler orders.place: dependency ")
    assert FAULTS[dependency] in found.faults[0]
    assert found.quick is None
    with pytest.raises(WiringError) as caught:
        await found.call("m", Frame())
    assert caught.value.faults == found.faults


def test_handler_faults() -> None:
    """What the bus cannot fill in a handler is a sentence, and all of them are said."""

    async def handler(m: str, x: int, request: Request, u: Annotated[int, Depends(Unhashable())]) -> None: ...
    async def generator(m: str) -> AsyncIterator[int]:
        yield 1

    faults = injected(handler).faults
    assert len(faults) == 3
    assert faults[0] == (
        "handler orders.place: parameter 'x' is not one that the bus can fill: say Annotated[T, Depends(f)], Context, "
        "EventBus or Transaction[S], or give it a default"
    )
    assert "'request' asks for Request" in faults[1]
    assert "has a hash" in faults[2]
    assert "a generator cannot be a handler" in injected(generator).faults[0]
    assert "a class cannot be a handler" in injected(Stock).faults[0]


async def test_handler_that_forgets_to_await() -> None:
    """A plain def that returns a coroutine fails, instead of losing the message silently."""
    with pytest.raises(TypeError, match="make it async def"):
        await run(lambda m: aone())


# ---- values


async def test_values_are_shared_within_a_handling() -> None:
    """A dependency runs once per handling; use_cache=False runs it again, and another scope is another value."""
    runs: list[str] = []

    def base() -> int:
        runs.append("base")
        return len(runs)

    def upper(b: Annotated[int, Depends(base)]) -> int:
        return b

    async def handler(
        m: str,
        a: Annotated[int, Depends(upper)],
        b: Annotated[int, Depends(base)],
        c: Annotated[int, Depends(base, use_cache=False)],
        d: Annotated[int, Depends(base, scope="function")],
    ) -> tuple[int, ...]:
        return a, b, c, d

    found = injected(handler)
    assert await handle(found) == (1, 1, 2, 3)
    assert await handle(found) == (4, 4, 5, 6)


async def test_cached_function_leaves_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function behind lru_cache runs in a thread, and is then asked on the loop, alone or among others."""
    threads: list[str] = []
    hops: list[object] = []

    async def hop(*args: Any) -> Any:
        hops.append(args)
        return await in_thread(*args)

    in_thread = eventbus.inject._in_thread
    monkeypatch.setattr(eventbus.inject, "_in_thread", hop)

    @functools.lru_cache
    def settings() -> int:
        threads.append(threading.current_thread().name)
        return len(threads)

    async def alone(m: str, s: Annotated[int, Depends(settings)]) -> int:
        return s

    async def among(m: str, ctx: Context, s: Annotated[int, Depends(settings)]) -> int:
        return s

    for func in (alone, among):
        found = injected(func)
        assert [await handle(found), await handle(found)] == [1, 1]
    assert len(hops) == 2
    assert len(threads) == 1
    assert threads[0] != threading.current_thread().name


async def test_quick() -> None:
    """The quick call does without a frame, but while it is cold, overridden or failing."""
    full: list[str] = []
    broken = False

    @functools.lru_cache
    def settings() -> int:
        if broken:
            raise Oops
        return 1

    async def handler(m: str, s: Annotated[int, Depends(settings)]) -> int:
        return s

    overrides: dict[Callable[..., Any], Callable[..., Any]] = {}
    found = injected(handler, overrides)

    async def otherwise(message: str) -> Any:
        full.append(message)
        return await handle(found)

    assert found.quick is not None
    quick = found.quick(otherwise)
    assert [await quick("cold"), await quick("warm")] == [1, 1]
    overrides[settings] = lambda: 2
    assert await quick("overridden") == 2
    overrides.clear()
    assert await quick("warm") == 1
    settings.cache_clear()
    broken = True
    called = quick("failing")
    with pytest.raises(Oops):
        await called
    assert full == ["cold", "overridden", "failing"]


# ---- overrides


async def test_overrides_may_change_at_any_time() -> None:
    """Overrides are looked up at every call, at any depth, with dependencies of their own."""
    log: list[str] = []

    def deep() -> str:
        return "deep"

    def upper(d: Annotated[str, Depends(deep)]) -> str:
        return f"upper {d}"

    async def handler(m: str, u: Annotated[str, Depends(upper)]) -> str:
        return u

    def own() -> str:
        return "own"

    async def fake(o: Annotated[str, Depends(own)], ctx: Context, bus: EventBus) -> AsyncIterator[str]:
        log.append("open")
        yield f"fake {o}"
        log.append("close")

    overrides: dict[Callable[..., Any], Callable[..., Any]] = {}
    found = injected(handler, overrides)
    assert await handle(found) == "upper deep"
    overrides[deep] = fake
    assert await handle(found) == "upper fake own"
    assert log == ["open", "close"]
    overrides[own] = lambda: "other"
    assert await handle(found) == "upper fake other"
    overrides[handler] = lambda: "irrelevant"
    assert await handle(found) == "upper fake other"
    overrides[upper] = lambda: "short"
    assert await handle(found) == "short"
    overrides.clear()
    assert await handle(found) == "upper deep"


async def test_overrides_that_cannot_work() -> None:
    """A fault in an override, or a transaction that nothing but an override asks for, is said when it is called."""

    async def handler(m: str, x: Annotated[int, Depends(one)]) -> int:
        return x

    def circle(x: Annotated[int, Depends(one)]) -> int:
        return x

    def transactional(tx: Transaction[Session]) -> int:
        return 1

    overrides: dict[Callable[..., Any], Callable[..., Any]] = {}
    found = injected(handler, overrides)
    for override, sentence in {
        of_request: "dependency of_request: parameter 'request' asks for Request",
        circle: "dependency circle > circle: goes round",
        transactional: "an override asks for a Transaction",
    }.items():
        overrides[one] = override
        with pytest.raises(WiringError, match=sentence):
            await found.call("m", Frame(Context.of(Ping()), BUS))
    overrides.clear()
    assert await handle(found) == 1


async def test_overrides_at_compile_time() -> None:
    """What is overridden when the bus compiles is judged by its override, and falls back to its fault."""

    async def handler(m: str, x: Annotated[int, Depends(of_request)]) -> int:
        return x

    def fake(tx: Transaction[Session]) -> int:
        return 1

    overrides: dict[Callable[..., Any], Callable[..., Any]] = {of_request: fake}
    found = injected(handler, overrides)
    assert (found.faults, found.transactions) == ((), (Session,))
    assert await handle(found) == 1
    overrides.clear()
    with pytest.raises(WiringError, match="asks for Request"):
        await handle(found)


# ---- opening and closing


def opener(log: list[str], name: str, *, threaded: bool = False) -> Callable[..., Any]:
    """Return a yield dependency that logs."""

    async def dependency() -> AsyncIterator[str]:
        log.append(f"+{name}")
        try:
            yield name
        except BaseException as error:
            log.append(f"{name}:{type(error).__name__}")
            raise
        finally:
            log.append(f"-{name}")

    def threaded_dependency() -> Iterator[str]:
        log.append(f"+{name}")
        try:
            yield name
        except BaseException as error:
            log.append(f"{name}:{type(error).__name__}")
            raise
        finally:
            log.append(f"-{name}")

    return threaded_dependency if threaded else dependency


@pytest.mark.parametrize("threaded", [False, True])
async def test_scopes_around_the_commit(threaded: bool) -> None:
    """scope="function" is closed before the commit, all others after it, and all in reverse order of opening."""
    log: list[str] = []
    f, g, r, s = (opener(log, name, threaded=threaded) for name in "fgrs")

    async def handler(
        m: str,
        a: Annotated[str, Depends(f, scope="function")],
        b: Annotated[str, Depends(r)],
        c: Annotated[str, Depends(g, scope="function")],
        d: Annotated[str, Depends(s, scope="request")],
    ) -> str:
        log.append(a + b + c + d)
        return m

    assert await run(handler, log) == "m"
    assert log == ["+r", "+s", "+f", "+g", "frgs", "-g", "-f", "commit", "-s", "-r"]


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("scope", ["function", "request"])
async def test_error_reaches_every_dependency(threaded: bool, scope: Any) -> None:
    """The handler's error is thrown into the open dependencies and arrives unchanged, traceback included."""
    log: list[str] = []
    a, b = opener(log, "a", threaded=threaded), opener(log, "b", threaded=threaded)

    async def handler(
        m: str, x: Annotated[str, Depends(a, scope=scope)], y: Annotated[str, Depends(b, scope=scope)]
    ) -> None:
        raise Oops

    with pytest.raises(Oops) as caught:
        await run(handler, log)
    assert log == ["+a", "+b", "b:Oops", "-b", "a:Oops", "-a"]
    assert caught.value.__context__ is None
    assert caught.traceback[-1].name == "handler"
    assert not {"dependency", "threaded_dependency"} & {entry.name for entry in caught.traceback}


def swallowing() -> Iterator[int]:
    with suppress(BaseException):
        yield 1


async def swallowing_later() -> AsyncIterator[int]:
    with suppress(BaseException):
        yield 1


@pytest.mark.parametrize("dependency", [swallowing, swallowing_later])
@pytest.mark.parametrize(
    "error", [Oops(), StopAsyncIteration(), KeyboardInterrupt(), BaseExceptionGroup("", [Oops(), KeyboardInterrupt()])]
)
async def test_no_error_is_swallowed(dependency: Callable[..., Any], error: BaseException) -> None:
    """A dependency that catches the error and goes on keeps nobody from knowing."""

    async def handler(m: str, x: Annotated[int, Depends(dependency)], y: Annotated[int, Depends(short)]) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await run(handler)
    assert caught.value is error


@pytest.mark.parametrize("threaded", [False, True])
async def test_error_may_be_replaced(threaded: bool) -> None:
    """What a dependency raises instead goes on, with all that led to it, into the dependencies below."""
    log: list[str] = []

    async def later(low: Annotated[str, Depends(opener(log, "low", threaded=threaded))]) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise ValueError

    def now(low: Annotated[int, Depends(later)]) -> Iterator[int]:
        try:
            yield 1
        except Oops:
            raise KeyError from None

    async def handler(m: str, x: Annotated[int, Depends(now)]) -> None:
        raise Oops

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        await run(handler)
    assert log == ["+low", "low:ValueError", "-low"]
    assert isinstance(caught.value.__context__, KeyError)
    assert isinstance(caught.value.__context__.__context__, Oops)


async def test_replacement_knows_the_error() -> None:
    """What a dependency raises after it has caught the error is chained to it, whoever closes."""

    def dependency() -> Iterator[int]:
        with suppress(Oops):
            yield 1
        raise KeyError

    async def handler(m: str, x: Annotated[int, Depends(dependency)]) -> None: ...

    frame = Frame()
    await injected(handler).call("m", frame)
    error = Oops()
    with pytest.raises(KeyError) as caught:
        await close(frame, error)
    assert caught.value.__context__ is error


closed: list[str] = []
"""The functions that were closed at their second yield."""


def never() -> Iterator[int]:
    yield from ()


async def never_later() -> AsyncIterator[int]:
    for number in ():
        yield number


def twice() -> Iterator[int]:
    with suppress(Oops):
        yield 1
    try:
        yield 2
    finally:
        closed.append("twice")


async def twice_later() -> AsyncIterator[int]:
    with suppress(Oops):
        yield 1
    try:
        yield 2
    finally:
        closed.append("twice_later")


@pytest.mark.parametrize(
    ("dependency", "sentence"),
    [
        (never, "did not yield"),
        (never_later, "did not yield"),
        (twice, "more than once"),
        (twice_later, "more than once"),
    ],
)
@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("scope", ["function", "request"])
async def test_yields_exactly_once(dependency: Callable[..., Any], sentence: str, failing: bool, scope: Any) -> None:
    """A dependency that yields never or twice is an error that says so, and all are closed all the same."""
    log: list[str] = []
    closed.clear()

    async def handler(
        m: str, x: Annotated[str, Depends(opener(log, "a"))], y: Annotated[int, Depends(dependency, scope=scope)]
    ) -> None:
        if failing:
            raise Oops

    with pytest.raises(RuntimeError, match=f"dependency {dependency.__name__} .*{sentence}"):
        await run(handler)
    assert log == ["+a", "a:RuntimeError", "-a"]
    assert closed == ([] if "never" in dependency.__name__ else [dependency.__name__])


# ---- cancellation


async def pause() -> None:
    """Wait so long that only a cancellation ends it."""
    await anyio.sleep(30)


async def holding_nothing() -> AsyncIterator[int]:
    yield 1


async def holding_scope() -> AsyncIterator[int]:
    with anyio.CancelScope():
        yield 1


async def holding_group() -> AsyncIterator[int]:
    async with anyio.create_task_group() as group:
        group.start_soon(pause)
        yield 1
        group.cancel_scope.cancel()


async def holding_stack() -> AsyncIterator[int]:
    stack = AsyncExitStack()
    await stack.enter_async_context(anyio.create_task_group())
    try:
        yield 1
    finally:
        await stack.aclose()


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(
    "holding", [holding_nothing, holding_scope, holding_group, holding_stack, YieldingMaker().held]
)
async def test_cancelled_handler(threaded: bool, holding: Callable[..., Any]) -> None:
    """Clean-up finishes although the handling is cancelled, also around and above one that has a task group open."""
    log: list[str] = []

    async def careful() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await anyio.sleep(0.01)
            log.append("clean")

    async def upper(x: Annotated[int, Depends(holding)]) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await anyio.sleep(0.01)
            log.append("clean")

    async def handler(
        m: str,
        x: Annotated[int, Depends(careful)],
        y: Annotated[int, Depends(upper)],
        z: Annotated[str, Depends(opener(log, "a", threaded=threaded))],
    ) -> None:
        scope.cancel()
        await pause()

    with anyio.CancelScope() as scope:
        await run(handler, log)
    assert scope.cancelled_caught
    assert log[0] == "+a"
    assert log[2:] == ["-a", "clean", "clean"]
    await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("held", [False, True])
async def test_clean_up_ends_in_time(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean-up that hangs is itself cancelled after a while; the ones below it are closed all the same."""
    monkeypatch.setattr(eventbus.inject, "CLEAN_UP", 0.02)
    log: list[str] = []

    async def hanging(x: Annotated[str, Depends(opener(log, "a", threaded=True))]) -> AsyncIterator[int]:
        try:
            if held:
                with anyio.CancelScope():
                    yield 1
            else:
                yield 1
        finally:
            await pause()

    async def handler(m: str, x: Annotated[int, Depends(hanging)]) -> None:
        scope.cancel()
        try:
            await pause()
        finally:
            if m == "failing":
                raise Oops

    with anyio.CancelScope() as scope:
        await run(handler, log)
    assert scope.cancelled_caught
    assert log[2:] == ["-a"]
    with anyio.CancelScope() as scope:
        with pytest.raises(Oops):
            await handle(injected(handler), "failing")
        log.append("failed")
    assert log[-1] == "failed"


async def test_rollback_after_function_scope_is_cancelled() -> None:
    """What shields the clean-up of scope="function" does not shield what comes between it and the rest."""

    async def holding() -> AsyncIterator[int]:
        with anyio.CancelScope():
            yield 1

    async def handler(
        m: str, x: Annotated[int, Depends(holding)], y: Annotated[int, Depends(short, scope="function")]
    ) -> None:
        scope.cancel()
        await anyio.lowlevel.checkpoint()

    frame = Frame()
    with anyio.CancelScope() as scope:
        try:
            await injected(handler).call("m", frame)
        except BaseException as error:
            assert anyio.current_effective_deadline() <= anyio.current_time()
            await close(frame, error)
            raise
    assert scope.cancelled_caught


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
class TestNativeCancellation:
    """asyncio's own cancellation goes through shields; it is delivered once, and threads run on."""

    async def cancelled(
        self, func: Callable[..., Any], started: threading.Event, go_on: threading.Event | None = None
    ) -> None:
        task = asyncio.create_task(run(func))
        await anyio.to_thread.run_sync(started.wait, 30)
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0.01)
        if go_on is not None:
            go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_while_handled(self) -> None:
        """The clean-up runs to its end."""
        log: list[str] = []
        started = threading.Event()

        async def careful() -> AsyncIterator[int]:
            try:
                yield 1
            finally:
                await asyncio.sleep(0.01)
                log.append("clean")

        async def handler(
            m: str, x: Annotated[int, Depends(careful)], y: Annotated[str, Depends(opener(log, "a", threaded=True))]
        ) -> None:
            started.set()
            await pause()

        await self.cancelled(handler, started)
        assert log == ["+a", "a:CancelledError", "-a", "clean"]

    async def test_while_a_thread_opens(self) -> None:
        """What a thread opens for a task that is gone is closed."""
        log: list[str] = []
        started, go_on = threading.Event(), threading.Event()

        def slow() -> Iterator[int]:
            started.set()
            assert go_on.wait(10)
            log.append("open")
            try:
                yield 1
            finally:
                log.append("close")

        async def handler(m: str, x: Annotated[int, Depends(slow)]) -> None:
            log.append("handled")

        await self.cancelled(handler, started, go_on)
        assert log == ["open", "close"]

    async def test_while_a_thread_closes(self) -> None:
        """The next dependency is closed after the thread has closed this one."""
        log: list[str] = []
        started, go_on = threading.Event(), threading.Event()

        def slow(x: Annotated[str, Depends(opener(log, "a"))]) -> Iterator[int]:
            yield 1
            started.set()
            assert go_on.wait(10)
            log.append("close")

        async def handler(m: str, x: Annotated[int, Depends(slow)]) -> None: ...

        await self.cancelled(handler, started, go_on)
        assert log == ["+a", "close", "a:CancelledError", "-a"]


@dataclass
class Stepped:
    """Step a coroutine by hand until it yields this very object."""

    coroutine: Any = None

    def __await__(self) -> Generator[Any, Any, None]:
        while (yielded := self.coroutine.send(None)) is not self:
            yield yielded


class Here:
    def __init__(self, mark: object) -> None:
        self.mark = mark

    def __await__(self) -> Generator[Any, Any, None]:
        yield self.mark


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_abandoned_handling() -> None:
    """A coroutine that is closed in the middle closes all that it has opened, without waiting for a thread."""
    log: list[str] = []
    stepped = Stepped()
    a, b = opener(log, "a", threaded=True), opener(log, "b")

    async def handler(
        m: str, x: Annotated[str, Depends(a, scope="function")], y: Annotated[str, Depends(b, scope="function")]
    ) -> None:
        await Here(stepped)

    stepped.coroutine = injected(handler).call("m", Frame())
    await stepped
    stepped.coroutine.close()
    assert log == ["+a", "+b", "b:GeneratorExit", "-b", "a:GeneratorExit", "-a"]


# ---- threads


async def test_threads_see_context_variables() -> None:
    """Handlers and dependencies in threads see the context variables of the task."""
    variable: ContextVar[str] = ContextVar("variable")

    def dependency() -> str:
        return variable.get()

    def opened() -> Iterator[str]:
        yield variable.get()

    def handler(m: str, x: Annotated[str, Depends(dependency)], y: Annotated[str, Depends(opened)]) -> tuple[str, ...]:
        return variable.get(), x, y

    variable.set("set")
    assert await run(handler) == ("set", "set", "set")


async def test_thread_that_waits_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handlers in threads that wait for handlers in threads do not run out of them."""
    monkeypatch.setattr(eventbus.inject, "THREADS", 1)
    monkeypatch.setattr(eventbus.inject, "_places", anyio.lowlevel.RunVar("test"))
    inner = injected(lambda m: m)

    def outer(m: str) -> Any:
        return anyio.from_thread.run(handle, inner, "inner")

    with anyio.fail_after(30):
        assert await run(outer) == "inner"


async def test_threads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more handlers than there are places run in threads at once, also in a task that a thread has started."""
    monkeypatch.setattr(eventbus.inject, "THREADS", 2)
    monkeypatch.setattr(eventbus.inject, "_places", anyio.lowlevel.RunVar("test"))
    lock, running, most = threading.Lock(), 0, 0

    def handler(m: str) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.005)
        with lock:
            running -= 1

    async def many() -> None:
        await over.wait()
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(handle, injected(handler))

    def starting(m: str) -> None:
        anyio.from_thread.run_sync(outer.start_soon, many)

    over = anyio.Event()
    async with anyio.create_task_group() as outer:
        await handle(injected(starting))
        over.set()
    assert 1 <= most <= 2


# ---- random graphs


@dataclass(frozen=True)
class Edge:
    target: int
    cached: bool
    scope: Any


@dataclass(frozen=True)
class Graph:
    """Describe dependencies, each of which needs earlier ones only, a handler, and the one place that fails."""

    kinds: list[str]
    edges: list[list[Edge]]
    """Of every node, the last being the handler."""
    fails: tuple[int, str]
    cancels: str | None


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(1, 8))
    kinds = draw(
        st.lists(st.sampled_from(["async", "sync", "asyncgen", "held", "gen"]), min_size=count, max_size=count)
    )
    edges = [
        [
            Edge(target, draw(st.booleans()), draw(st.sampled_from([None, "request", "function"])))
            for target in sorted(draw(st.sets(st.integers(0, node - 1), max_size=3)) if node else ())
        ]
        for node in range(count)
    ]
    top = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4))
    edges.append([Edge(target, draw(st.booleans()), draw(st.sampled_from([None, "function"]))) for target in top])
    place = (draw(st.integers(0, count)), draw(st.sampled_from(["open", "close", "swallow", "again", "nothing"])))
    return Graph(kinds, edges, place, draw(st.sampled_from([None, "scope", "task"])))


@dataclass
class World:
    """Keep what happened while a graph was handled."""

    graph: Graph
    backend: str
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    opened: list[int] = field(default_factory=list[int])
    closed: list[int] = field(default_factory=list[int])
    failed: list[int] = field(default_factory=list[int])
    count: int = 0

    def begin(self, node: int, values: dict[str, Any]) -> None:
        assert list(values.values()) == [edge.target for edge in self.graph.edges[node]]
        if self.graph.fails == (node, "open"):
            self.failed.append(node)
            raise Oops(node)

    def open(self, node: int, values: dict[str, Any]) -> int:
        self.begin(node, values)
        self.count += 1
        self.opened.append(self.count)
        return self.count

    def close(self, node: int, number: int) -> None:
        self.closed.append(number)
        if self.graph.fails == (node, "close"):
            self.failed.append(node)
            raise Oops(node)

    @contextmanager
    def around(self, node: int, values: dict[str, Any]) -> Iterator[None]:
        number = self.open(node, values)
        try:
            yield
        except BaseException:
            if self.graph.fails != (node, "swallow"):
                raise
        finally:
            self.close(node, number)

    def again(self, node: int) -> bool:
        if self.graph.fails == (node, "again"):
            self.failed.append(node)
        return self.graph.fails == (node, "again")

    def function(self, node: int) -> Callable[..., Any]:
        """Return the dependency, or the handler, that a node describes."""
        if node == len(self.graph.kinds):
            return self.handler(node)
        kinds: dict[str, Callable[[int], Callable[..., Any]]] = {
            "async": self.later,
            "sync": self.now,
            "asyncgen": self.yielding_later,
            "held": self.holding,
            "gen": self.yielding,
        }
        return kinds[self.graph.kinds[node]](node)

    def later(self, node: int) -> Callable[..., Any]:
        async def later(**values: Any) -> int:
            await anyio.lowlevel.checkpoint()
            self.begin(node, values)
            return node

        return later

    def now(self, node: int) -> Callable[..., Any]:
        def now(**values: Any) -> int:
            self.begin(node, values)
            return node

        return now

    def yielding_later(self, node: int) -> Callable[..., Any]:
        async def yielding_later(**values: Any) -> AsyncIterator[int]:  # without any with: see Node.scopes
            number = self.open(node, values)
            try:
                await anyio.lowlevel.checkpoint()
                yield node
            except BaseException:
                if self.graph.fails != (node, "swallow"):
                    raise
            finally:
                await anyio.lowlevel.checkpoint()
                self.close(node, number)
            if self.again(node):
                yield node

        return yielding_later

    def holding(self, node: int) -> Callable[..., Any]:
        async def holding(**values: Any) -> AsyncIterator[int]:
            async with anyio.create_task_group() as group:
                group.start_soon(pause)
                with self.around(node, values):
                    try:
                        yield node
                    finally:
                        group.cancel_scope.cancel()

        return holding

    def yielding(self, node: int) -> Callable[..., Any]:
        def yielding(**values: Any) -> Iterator[int]:
            with self.around(node, values):
                yield node
            if self.again(node):
                yield node

        return yielding

    def handler(self, node: int) -> Callable[..., Any]:
        async def handler(message: str, **values: Any) -> str:
            if self.graph.cancels == "task" and self.backend == "asyncio":
                cast("asyncio.Task[Any]", asyncio.current_task()).cancel()
            elif self.graph.cancels:
                self.scope.cancel()
            await anyio.lowlevel.checkpoint()
            self.begin(node, values)
            return message

        return handler

    def compiled(self) -> Injected:
        functions = [self.function(node) for node in range(len(self.graph.edges))]
        for function, edges in zip(functions, self.graph.edges, strict=True):
            parameters = [
                Parameter(
                    f"x{index}",
                    Parameter.KEYWORD_ONLY,
                    annotation=Annotated[Any, Depends(functions[edge.target], use_cache=edge.cached, scope=edge.scope)],
                )
                for index, edge in enumerate(edges)
            ]
            message = [Parameter("message", Parameter.POSITIONAL_ONLY)] if function is functions[-1] else []
            function.__signature__ = Signature([*message, *parameters])  # type: ignore[attr-defined]
        return injected(functions[-1])


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@given(graph=graphs())
def test_each_is_opened_once_and_closed_once(anyio_backend: str, graph: Graph) -> None:
    """Whatever fails, and wherever: what was opened is closed, in reverse order, and the failure arrives."""

    async def main() -> None:
        world = World(graph, anyio_backend)
        compiled = world.compiled()
        if compiled.faults:
            assert all('scope="function"' in fault for fault in compiled.faults)
            return
        outcome: object = None
        with world.scope:
            try:
                outcome = await handle(compiled)
            except anyio.get_cancelled_exc_class():
                outcome = "cancelled"
                if graph.cancels == "scope" or anyio_backend == "trio":
                    raise
            except (Oops, RuntimeError, ExceptionGroup) as error:
                outcome = error
        assert world.closed == world.opened[::-1]
        if world.failed:
            assert isinstance(outcome, Exception)
            assert graph.fails[1] != "again" or "more than once" in repr(outcome)
        else:
            assert outcome in ("m", "cancelled")

    anyio.run(main, backend=anyio_backend)
