"""The harness in tests that are not async: TestClient, the standard library's unittest, and no test library at all."""

import unittest
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest
from fastapi import FastAPI, WebSocket

from eventbus import Command, Event, EventBus, Module, NotRunningError, Retry
from eventbus.fastapi import BusDep, install
from eventbus.testing import BlockingHarness, UnobservedError, blocking, harness

with warnings.catch_warnings():  # newer versions would rather have another client library below
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient


class Place(Command[int], name="b.place"):
    """Ask to place something."""

    number: int = 0


class Placed(Event, name="b.placed"):
    """State that something was placed."""

    number: int = 0


def application() -> tuple[FastAPI, EventBus]:
    """Return an application with its bus."""
    module, app = Module("m"), FastAPI()

    @module.handles(Place)
    async def place(cmd: Place, bus: EventBus) -> int:
        await bus.publish(Placed(number=cmd.number), delay=60)
        return cmd.number

    @module.on(Placed, retry=Retry(attempts=2, initial=5))
    async def placed(event: Placed) -> None:
        if event.number == 13:
            raise ValueError

    bus = EventBus(module, routes={"b.*": "memory"})
    install(app, bus)

    @app.post("/places")
    async def create(body: Place, bus: BusDep) -> int:
        return await bus.send(body)

    @app.websocket("/live")
    async def live(socket: WebSocket, bus: BusDep) -> None:
        await socket.accept()
        async with bus.stream(Placed) as events:
            await socket.send_text("ready")
            async for event in events:
                await socket.send_text(str(getattr(event, "number", None)))

    return app, bus


APP, BUS = application()


@contextmanager
def opened(backend: str = "asyncio") -> Iterator[BlockingHarness]:
    """Open the harness on the application that all tests share."""
    with blocking(harness(BUS, app=APP), backend=backend) as t:
        yield t


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_client_in_the_loop_of_the_bus(backend: str) -> None:
    """Starlette's TestClient speaks to the application in the event loop of its bus, and time stands still."""
    with opened(backend) as t:
        assert isinstance(t.client, TestClient)
        assert t.client.post("/places", json={"number": 4}).json() == 4
        t.settled()
        assert t.published(Placed, number=4).one()
        assert not t.handled("m.placed")
        t.advance(60)
        assert t.handled("m.placed") == [Placed(number=4)]
        assert t.sent(Place) == [Place(number=4)]
        with t.client.websocket_connect("/live") as socket:
            assert socket.receive_text() == "ready"
            t.publish(Placed(number=5))
            assert socket.receive_text() == "5"
        assert t.client is t.client
    with TestClient(APP) as client:  # and afterwards it is as it was
        assert client.post("/places", json={"number": 1}).json() == 1


def test_everything_without_await() -> None:
    """Sending, enqueueing, stubs, failures and the dead are there as well."""
    with opened() as t:
        assert t.send(Place(number=1)) == 1
        stub = t.stub("m.place", returns=7)
        assert t.enqueue(Place(number=2)).id
        t.settled()
        assert stub.messages == [Place(number=2)]
        t.publish(Placed(number=13))
        t.advance(100)
        assert len(t.failed("m.placed")) == 2
        assert len(t.dead) == 1
    with pytest.raises(UnobservedError), opened() as t:
        t.publish(Placed(number=13))
    with blocking(harness(BUS)) as t, pytest.raises(RuntimeError, match=r"harness\(bus, app=app\)"):
        t.client.get("/")


class Case(unittest.TestCase):
    """Be a test of the standard library's."""

    def test_place(self) -> None:
        with opened() as t:
            assert t.send(Place(number=3)) == 3


def test_without_pytest() -> None:
    """The harness needs no test library: unittest, or a plain function, will do."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert (result.testsRun, result.failures, result.errors) == (1, [], [])


def test_one_bus_in_tests_of_every_kind() -> None:
    """The bus at module level is free again after each of them, and has run in none of their loops."""
    for backend in ("asyncio", "trio", "asyncio"):
        with opened(backend) as t:
            t.send(Place())
    with pytest.raises(NotRunningError):
        anyio.run(BUS.publish, Placed())
