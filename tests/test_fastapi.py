"""The bus inside a FastAPI application: lifetime, dependency, overrides, documents, and what ends early."""

import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import UUID

import anyio
import anyio.from_thread
import anyio.lowlevel
import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from eventbus import Command, Event, EventBus, Module, NotRunningError, WiringError
from eventbus.fastapi import BusDep, install
from eventbus.testing.harness import harness

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would rather have httpx2
    from fastapi.testclient import TestClient

Lifespan = Callable[[FastAPI], Any]


class Add(Command[int], name="math.add"):
    left: int
    right: int = 0


class Added(Event, name="math.added", key="total"):
    total: int


class Shown(Event, name="math.shown"):
    total: int


def offset() -> int:
    """Be overridden."""
    return 0


Offset = Annotated[int, Depends(offset)]


class Math:
    """One application with one bus, fresh for every test."""

    def __init__(self, lifespan: Lifespan | None = None) -> None:
        self.added: list[int] = []
        self.shown: list[int] = []
        self.module = Module("math")
        self.module.handles(Add)(self.add)
        self.module.on(Added)(self.on_added)
        self.module.on(Shown)(self.on_shown)
        self.bus = EventBus(self.module, name="math", routes={Added: "memory"})
        self.app = FastAPI(lifespan=lifespan)

    async def add(self, cmd: Add, offset: Offset) -> int:
        return cmd.left + cmd.right + offset

    async def on_added(self, event: Added, offset: Offset) -> None:
        self.added.append(event.total + offset)

    async def on_shown(self, event: Shown) -> None:
        self.shown.append(event.total)


@pytest.fixture
def math() -> Math:
    """Return an application with the bus installed, and an endpoint for each verb."""
    math = Math()
    install(math.app, math.bus, health="/health/bus")

    @math.app.post("/add")
    async def add(body: Add, bus: BusDep) -> int:
        return await bus.send(body)

    @math.app.post("/added")
    async def added(body: Added, bus: BusDep) -> str:
        return (await bus.publish(body)).id

    @math.app.post("/shown")
    async def shown(body: Shown, bus: BusDep) -> str:
        return (await bus.publish(body)).id

    return math


# Lifetime


@pytest.mark.parametrize("first", ["install", "router"])
def test_bus_lives_inside_the_application(first: str) -> None:
    """The bus starts after the application's own resources, and routers' before it, and stops before them."""
    log: list[tuple[str, str]] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, str]]:
        log.append(("app", math.bus.health().state))
        yield {"pool": "open"}
        log.append(("app", math.bus.health().state))

    @asynccontextmanager
    async def of_router(_: FastAPI) -> AsyncIterator[None]:
        log.append(("router", math.bus.health().state))
        yield
        log.append(("router", math.bus.health().state))

    math = Math(lifespan)
    router = APIRouter(lifespan=of_router)
    if first == "install":
        install(math.app, math.bus)
        math.app.include_router(router)
    else:
        math.app.include_router(router)
        install(math.app, math.bus)

    @math.app.get("/pool")
    async def pool(request: Request) -> str:
        return f"{request.state.pool} {math.bus.health().state}"

    with TestClient(math.app) as client:
        assert client.get("/pool").json() == "open running"
    early, late = ("not started", "stopped") if first == "router" else ("running", "running")
    assert log == [("app", "not started"), ("router", early), ("router", late), ("app", "stopped")]


def test_old_hooks_still_run() -> None:
    """An application with start-up and shutdown hooks keeps them around the life of its bus."""
    log: list[str] = []
    bus = EventBus()
    app = FastAPI(
        on_startup=[lambda: log.append(bus.health().state)], on_shutdown=[lambda: log.append(bus.health().state)]
    )
    install(app, bus)
    with TestClient(app):
        log.append(bus.health().state)
    assert log == ["not started", "running", "stopped"]


def test_application_lives_twice(math: Math) -> None:
    """An application that is started again has its bus again, with what waited in memory."""
    for total in (1, 2):
        with TestClient(math.app) as client:
            client.post("/added", json={"total": total})
    assert math.added == [1, 2]


def test_failed_start_closes_the_bus() -> None:
    """A later resource that does not open ends the bus, and its error arrives unchanged."""

    @asynccontextmanager
    async def broken(_: FastAPI) -> AsyncIterator[None]:
        raise OSError("no pool")
        yield

    math = Math()
    install(math.app, math.bus)
    math.app.include_router(APIRouter(lifespan=broken))
    with pytest.raises(OSError, match="no pool"), TestClient(math.app):
        pass
    assert math.bus.health().state == "stopped"


def test_faults_of_the_wiring_stop_the_start() -> None:
    """An application whose bus is wired wrongly does not start, and says why."""
    app = FastAPI()
    install(app, EventBus(Module("math", messages=[Add])))
    with pytest.raises(WiringError, match="command Add has no handler"), TestClient(app):
        pass


def test_second_bus_is_refused(math: Math) -> None:
    """An application has one bus."""
    with pytest.raises(RuntimeError, match="has a bus already"):
        install(math.app, EventBus())


def test_install_after_compile() -> None:
    """A bus that was compiled before can be installed, and sees the overrides of the application."""
    math = Math()
    math.bus.compile()
    install(math.app, math.bus)
    math.app.dependency_overrides[offset] = lambda: 10

    @math.app.post("/add")
    async def add(body: Add, bus: BusDep) -> int:
        return await bus.send(body)

    with TestClient(math.app) as client:
        assert client.post("/add", json={"left": 1}).json() == 11


async def test_install_while_running() -> None:
    """A running bus cannot be installed any more, and the application is left as it was."""
    math = Math()
    async with math.bus.running():
        with pytest.raises(WiringError, match="before the bus runs"):
            install(math.app, math.bus)
    install(math.app, math.bus)


def test_one_bus_in_one_application_after_another() -> None:
    """A factory of applications, as tests have, may install the same bus in each of them in turn."""
    math = Math()
    for add in (10, 20):
        app = FastAPI()
        install(app, math.bus)
        app.dependency_overrides[offset] = lambda add=add: add

        @app.post("/add")
        async def endpoint(body: Add, bus: BusDep) -> int:
            return await bus.send(body)

        with TestClient(app) as client:
            assert client.post("/add", json={"left": 1}).json() == 1 + add


def test_publishing_only() -> None:
    """With ``consume=False`` nothing routed is handled here, and what is inline is."""
    math = Math()
    install(math.app, math.bus, consume=False, health="/health/bus")

    @math.app.post("/both")
    async def both(bus: BusDep) -> None:
        await bus.publish(Added(total=1))
        await bus.publish(Shown(total=2))

    with TestClient(math.app) as client:
        client.post("/both").raise_for_status()
        assert client.get("/health/bus").json()["sources"] == {}
    assert (math.added, math.shown) == ([], [2])


def test_health(math: Math) -> None:
    """The health route answers 200 while the bus runs and 503 otherwise, and is not part of the interface."""
    assert TestClient(math.app).get("/health/bus").status_code == 503
    with TestClient(math.app) as client:
        answer = client.get("/health/bus")
        assert (answer.status_code, answer.json()["state"]) == (200, "running")
        assert answer.json()["sources"]["math.added@math/math.on_added"]["connected"]
        assert "/health/bus" not in client.get("/openapi.json").json()["paths"]


def test_no_health_unless_asked() -> None:
    """Without ``health=`` no route is added."""
    math = Math()
    before = len(math.app.openapi()["paths"])
    install(math.app, math.bus)
    assert len(math.app.openapi()["paths"]) == before
    assert TestClient(math.app).get("/health/bus").status_code == 404


def test_without_fastapi() -> None:
    """Without FastAPI the import says what to install."""
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from eventbus import MissingExtraError\n"
        "try: import eventbus.fastapi\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "eventbus.fastapi needs an optional library: pip install 'eventbus[fastapi]'"


# Clients that start no lifespan


def test_client_without_lifespan(math: Math) -> None:
    """A TestClient without ``with`` starts nothing: what is inline works, what has a route says what is missing."""
    client = TestClient(math.app)
    assert client.post("/add", json={"left": 1, "right": 2}).json() == 3
    client.post("/shown", json={"total": 3}).raise_for_status()
    assert math.shown == [3]
    with pytest.raises(NotRunningError, match="with TestClient") as caught:
        client.post("/added", json={"total": 3})
    assert "'math.added', which has a route, needs a running bus, and this one is not started" in str(caught.value)


async def test_mounted_application() -> None:
    """A mounted application without the bus says so; installed on both, it works in the outer lifetime."""
    math, inner = Math(), FastAPI()

    @inner.post("/add")
    async def add(body: Add, bus: BusDep) -> int:
        await bus.publish(Added(total=body.left))
        return await bus.send(body)

    bare = FastAPI()
    bare.mount("/bare", inner)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(bare), base_url="http://test") as client:
        with pytest.raises(NotRunningError, match="which is mounted in another: install the bus on it, then"):
            await client.post("/bare/add", json={"left": 1})

    install(inner, math.bus)
    math.app.mount("/inner", inner)
    install(math.app, math.bus)
    async with harness(math.bus, app=math.app) as t:
        assert (await t.client.post("/inner/add", json={"left": 1})).json() == 1
        await t.settled()
        assert math.added == [1]


async def test_application_without_bus() -> None:
    """An endpoint that wants a bus where none is says what to do."""
    app = FastAPI()

    @app.get("/")
    async def root(bus: BusDep) -> None: ...

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        with pytest.raises(NotRunningError, match="not installed on this application: use") as caught:
            await client.get("/")
    assert "which is mounted" not in str(caught.value)


# The dependency


async def test_bus_in_endpoints(math: Math) -> None:
    """``BusDep`` is the installed bus in an endpoint, in a dependency of one, and in a plain ``def``."""

    def below(bus: BusDep) -> EventBus:
        return bus

    @math.app.get("/same")
    async def same(bus: BusDep, under: Annotated[EventBus, Depends(below)]) -> bool:
        return bus is under is math.bus

    @math.app.post("/thread")
    def thread(body: Add, bus: BusDep) -> int:
        anyio.from_thread.run(bus.publish, Added(total=body.left))
        return anyio.from_thread.run(bus.send, body)

    async with harness(math.bus, app=math.app) as t:
        assert (await t.client.get("/same")).json() is True
        assert (await t.client.post("/thread", json={"left": 4})).json() == 4
        await t.settled()
        assert math.added == [4]


def test_bus_in_websockets(math: Math) -> None:
    """``BusDep`` works in a WebSocket endpoint, which can stream what is published."""

    @math.app.websocket("/live")
    async def live(websocket: WebSocket, bus: BusDep) -> None:
        async with bus.stream(Added) as events:
            await websocket.accept()
            async for event in events:
                await websocket.send_json({"total": event.total if isinstance(event, Added) else None})

    with TestClient(math.app) as client:
        with client.websocket_connect("/live") as socket:
            client.post("/added", json={"total": 7})
            assert socket.receive_json() == {"total": 7}
        assert client.post("/add", json={"left": 1}).json() == 1


def test_background_tasks(math: Math) -> None:
    """Every verb can be a background task as it is, and really runs after the response."""

    @math.app.post("/later")
    async def later(tasks: BackgroundTasks, bus: BusDep) -> None:
        tasks.add_task(bus.send, Fix(total=1))
        tasks.add_task(bus.publish, Shown(total=2))
        tasks.add_task(bus.publish_many, [Added(total=3), Shown(total=4)])
        tasks.add_task(bus.enqueue, Keep(total=5))

    class Fix(Command, name="math.fix"):
        total: int

    class Keep(Fix, name="math.keep"):
        pass

    module = Module("more")

    @module.handles(Fix)
    async def fix(cmd: Fix) -> None:
        math.shown.append(cmd.total)

    @module.handles(Keep)
    async def keep(cmd: Keep) -> None:
        math.added.append(cmd.total)

    bus = EventBus(math.module, module, routes={Added: "memory", Keep: "memory"})
    app = FastAPI()
    install(app, bus)
    app.include_router(math.app.router)
    with TestClient(app) as client:
        client.post("/later").raise_for_status()
    assert (sorted(math.shown), sorted(math.added)) == ([1, 2, 4], [3, 5])


# Overrides


async def test_overrides_are_shared(math: Math) -> None:
    """An override of the application counts in endpoints and in handlers alike, and may change between calls."""

    @math.app.post("/offset")
    async def both(body: Add, bus: BusDep, offset: Offset) -> list[int]:
        return [await bus.send(body), offset]

    async with harness(math.bus, app=math.app) as t:

        async def ask() -> list[int]:
            await t.publish(Added(total=0))
            await t.settled()
            answer: list[int] = (await t.client.post("/offset", json={"left": 0})).json()
            return [*answer, math.added.pop()]

        assert await ask() == [0, 0, 0]
        math.app.dependency_overrides[offset] = lambda: 1
        assert await ask() == [1, 1, 1]
        math.app.dependency_overrides[offset] = lambda: 2
        assert await ask() == [2, 2, 2]
        math.app.dependency_overrides = {offset: lambda: 3}
        assert await ask() == [3, 3, 3]
        math.app.dependency_overrides = {}
        assert await ask() == [0, 0, 0]


async def test_overrides_of_the_harness_reach_endpoints(math: Math) -> None:
    """What the harness overrides counts in endpoints, and the application has its own back afterwards."""
    math.app.dependency_overrides[str] = repr

    @math.app.get("/offset")
    async def offset_(offset: Offset) -> int:
        return offset

    async with harness(math.bus, app=math.app, overrides={offset: lambda: 5}) as t:
        assert (await t.client.get("/offset")).json() == 5
        assert await t.send(Add(left=1)) == 6
    assert math.app.dependency_overrides == {str: repr}


async def test_overrides_from_before(math: Math) -> None:
    """What the bus was told to override before it was installed still counts; the application's word counts more."""
    math = Math()
    math.bus.overrides.update({offset: lambda: 7, str: repr})
    math.app.dependency_overrides[str] = ascii
    install(math.app, math.bus)
    assert await math.bus.send(Add(left=1)) == 8
    assert math.app.dependency_overrides[str] is ascii
    del math.bus.overrides[offset]
    assert await math.bus.send(Add(left=1)) == 1
    assert list(math.bus.overrides) == [str]


# A message is a body


def test_command_is_a_body(math: Math) -> None:
    """A command as a body has its class name in the documents, its own fields only, and the result as response."""

    class Order(Command[UUID], name="shop.order"):
        """Order something."""

        sku: str

    class Later(Command["Result"], name="shop.later"):
        sku: str

    class Result:
        pass

    @math.app.post("/order")
    async def order(body: Order) -> UUID: ...

    @math.app.post("/later")
    async def later(body: Later) -> None: ...

    schemas = math.app.openapi()["components"]["schemas"]
    assert {"Order", "Later", "Add", "Added", "Shown"} <= set(schemas)
    assert not [name for name in schemas if "[" in name or "Command" in name or "_" in name]
    assert schemas["Order"]["description"] == "Order something."
    assert list(schemas["Order"]["properties"]) == ["sku"]
    assert "description" not in schemas["Later"]


async def test_body_is_validated(math: Math) -> None:
    """A body that is no such command is answered with 422, and no handler hears of it."""
    async with harness(math.bus, app=math.app) as t:
        answer = await t.client.post("/add", json={"left": "x"})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "left"]
        assert t.handlings == []


# What a handler raises


async def test_errors_pass_through(math: Math) -> None:
    """What a handler raises reaches the application's exception handlers: from ``send`` as it is, else in a group."""

    class TooLargeError(Exception):
        pass

    class Grow(Command, name="math.grow"):
        by: int

    class Grew(Event, name="math.grew"):
        by: int

    module = Module("growing")

    @module.handles(Grow)
    async def grow(cmd: Grow) -> None:
        if cmd.by > 2:
            raise TooLargeError(cmd.by)
        raise HTTPException(409, "grows already")

    @module.on(Grew)
    async def check(event: Grew) -> None:
        raise TooLargeError(event.by)

    app = FastAPI()
    bus = EventBus(module)
    install(app, bus)

    @app.exception_handler(TooLargeError)
    async def too_large(_: Request, error: TooLargeError) -> JSONResponse:
        return JSONResponse({"by": error.args[0]}, 413)

    @app.exception_handler(ExceptionGroup)
    async def several(_: Request, error: ExceptionGroup[Exception]) -> JSONResponse:
        return JSONResponse([f"{one!r} {one.__notes__}" for one in error.exceptions], 500)

    @app.post("/grow")
    async def post_grow(body: Grow, bus: BusDep) -> None:
        await bus.send(body)

    @app.post("/grew")
    async def post_grew(body: Grew, bus: BusDep) -> None:
        await bus.publish(body)

    async with harness(bus, app=app) as t:
        large, taken = [await t.client.post("/grow", json={"by": by}) for by in (3, 1)]
        group = await t.client.post("/grew", json={"by": 1})
    assert (large.status_code, large.json()) == (413, {"by": 3})
    assert (taken.status_code, taken.json()) == (409, {"detail": "grows already"})
    assert (group.status_code, group.json()) == (500, ["TooLargeError(1) ['in handler growing.check of math.grew']"])


@pytest.mark.parametrize("scope", ["request", "function"])
@pytest.mark.parametrize("fails", [False, True])
async def test_yield_dependencies(scope: Any, fails: bool) -> None:
    """A ``yield`` dependency of a handler is its own, and closed, error included, before ``send`` is over."""
    log: list[str] = []

    async def session() -> AsyncIterator[str]:
        log.append("open")
        try:
            yield "session"
        except ValueError:
            log.append("rolled back")
            raise
        finally:
            log.append("closed")

    Session = Annotated[str, Depends(session, scope=scope)]  # noqa: N806 - a type
    math = Module("math")

    @math.handles(Add)
    async def add(cmd: Add, session: Session) -> int:
        log.append(session)
        if fails:
            raise ValueError(session)
        return 1

    app, bus = FastAPI(), EventBus(math)
    install(app, bus)

    @app.post("/add")
    async def endpoint(body: Add, bus: BusDep) -> int:
        try:
            return await bus.send(body)
        except ValueError:
            return 2
        finally:
            log.append("sent")

    async with harness(bus, app=app) as t:
        assert (await t.client.post("/add", json={"left": 1})).json() == (2 if fails else 1)
    assert log == ["open", "session", *(["rolled back"] if fails else []), "closed", "sent"]


# What ends early


class Caller:
    """Call an application as a server does, and hang up when told to."""

    def __init__(self, app: FastAPI, path: str) -> None:
        self.app = app
        self.scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        self.sent = b""
        self.news = anyio.Event()
        self.gone = anyio.Event()
        self._asked = False

    async def __call__(self) -> None:
        await self.app(self.scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.sent += message.get("body", b"")
        self.news.set()


async def test_client_that_hangs_up_ends_its_stream(math: Math) -> None:
    """A reader of server-sent events who hangs up leaves no stream behind."""

    @math.app.get("/live", response_class=EventSourceResponse)
    async def live(bus: BusDep) -> AsyncIterator[ServerSentEvent]:
        async with bus.stream(Added) as events:
            async for event in events:
                yield ServerSentEvent(event=type(event).__name__, data=event)

    call = Caller(math.app, "/live")
    async with harness(math.bus, app=math.app) as t:
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await call.news.wait()
            await anyio.wait_all_tasks_blocked()
            assert len(math.bus.engine.live.streams) == 1
            await t.publish(Added(total=1))
            await t.settled()
            call.gone.set()
        assert math.bus.engine.live.streams == []
    assert call.sent == b'event: Added\ndata: {"total":1}\n\n'


async def test_cancelled_request_cancels_its_handler() -> None:
    """A request that is cancelled cancels the handler that it waits for, whose dependencies are closed."""
    log: list[str] = []
    started = anyio.Event()

    async def session() -> AsyncIterator[None]:
        try:
            yield
        finally:
            log.append("closed")

    math = Module("math")

    @math.handles(Add)
    async def add(cmd: Add, _: Annotated[None, Depends(session)]) -> int:
        started.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            log.append("cancelled")
            raise
        return 1

    app, bus = FastAPI(), EventBus(math)
    install(app, bus)

    @app.get("/add")
    async def endpoint(bus: BusDep) -> int:
        return await bus.send(Add(left=1))

    async with harness(bus, app=app), anyio.create_task_group() as group:
        group.start_soon(Caller(app, "/add"))
        await started.wait()
        group.cancel_scope.cancel()
    assert log == ["cancelled", "closed"]
