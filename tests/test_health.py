"""Health by progress: each part that stands still turns it red within two sweeps, and it turns green by itself."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from anyio.to_thread import run_sync
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from eventbus import Event, EventBus, Limits, Lost, Module, PublishError, Refused, Reject, StoreError
from eventbus.clock import Runtime
from eventbus.fastapi import install
from eventbus.health import Health, examine
from eventbus.store import NewEntry, Recipient
from eventbus.stores.memory import MemoryStore
from eventbus.testing import harness
from eventbus.testing.clock import VirtualClock
from tests.doubles import Flaky
from tests.servers.databases import database
from tests.servers.fixtures import provide
from tests.servers.postgres import recipe
from tests.servers.server import Server

SWEEP = 5.0


class Paid(Event, name="t.paid", key="account"):
    """State that something was paid."""

    account: str = "a"


class Told(Event, name="t.told"):
    """State something that only others handle."""


class Ward(MemoryStore):
    """Be a store that fails, or falls silent, when it is told to."""

    broken = False
    silent: anyio.Event | None = None
    unsettled: anyio.Event | None = None
    asked = 0

    async def examined(self, answer: Callable[[], Awaitable[Any]]) -> Any:
        """Answer as it is told."""
        if self.silent is not None:
            await self.silent.wait()
        if self.broken:
            raise StoreError("connecting to db.internal with password hunter2 failed")
        return await answer()

    async def settle(self, *args: Any, **named: Any) -> Any:
        if self.unsettled is not None:
            await self.unsettled.wait()
        return await super().settle(*args, **named)

    async def claim(self, *args: Any, **named: Any) -> Any:
        return await self.examined(lambda: super(Ward, self).claim(*args, **named))

    async def due(self, *args: Any) -> Any:
        return await self.examined(lambda: super(Ward, self).due(*args))

    async def sweep(self, **named: Any) -> Any:
        return await self.examined(lambda: super(Ward, self).sweep(**named))

    async def backlog(self) -> Any:
        self.asked += 1
        return await self.examined(super().backlog)


class Clinic:
    """Run a bus with one handler on a clock that stands still."""

    def __init__(self, **options: Any) -> None:
        self.clock = VirtualClock()
        self.handled = 0
        self.error: Exception | None = None
        self.gate: anyio.Event | None = None
        module = Module("m", messages=[Told])

        @module.on(Paid)
        async def paid(event: Paid) -> None:
            if self.gate is not None:
                await self.gate.wait()
            if self.error is not None:
                raise self.error
            self.handled += 1

        if "store" in options:
            options["store"].bind(self.clock)
        limits = options.pop("limits", Limits(sweep=SWEEP))
        self.bus = EventBus(module, name="shop", limits=limits, **options)

    @asynccontextmanager
    async def open(self, consume: bool = True) -> AsyncIterator["Clinic"]:
        """Run for a while."""
        with self.bus.rewired(Runtime(self.clock, random=Random(0))):
            async with self.bus.running(consume):
                await turns()
                yield self

    async def pass_time(self, seconds: float) -> None:
        """Move on, stopping at every due time."""
        target = self.clock.monotonic() + seconds
        await turns()
        while (due := self.clock.next_due()) is not None and due <= target:
            self.clock.jump(due)
            await turns()
        self.clock.jump(target)
        await turns()

    def look(self) -> Health:
        """Return the health as this process sees it."""
        return self.bus.health()

    async def examine(self) -> Health:
        """Return the health with what waits."""
        return await examine(self.bus.engine)


async def turns() -> None:
    """Let everybody go on until they wait for something."""
    for _ in range(60):
        await checkpoint()


def stored(store: Any, **options: Any) -> Clinic:
    """Return a clinic whose event goes through a store."""
    return Clinic(store=store, routes={Paid: "store"}, **options)


# sources


async def test_source_that_gets_on() -> None:
    """A source of the store is asked for its progress: an idle one looks every sweep."""
    async with stored(Ward()).open() as clinic:
        await clinic.pass_time(SWEEP * 3 + 1)
        (source,) = clinic.look().sources.values()
        assert (True, True, None, False) == (source.alive, source.connected, source.waited, source.paused)
        assert source.age is not None
        assert source.age <= SWEEP
        assert (True, ()) == (clinic.look().healthy, clinic.look().faults)


@pytest.mark.parametrize("consume", [True, False])
async def test_store_that_fails(consume: bool) -> None:
    """A database that is gone is red within two sweeps, where nothing is handled too, and green once it is back."""
    store = Ward()
    async with stored(store).open(consume) as clinic:
        await clinic.pass_time(SWEEP + 1)
        store.broken = True
        await clinic.pass_time(SWEEP)
        report = clinic.look()
        assert (False, True) == (report.healthy, report.alive)
        assert "the store fails" in report.faults
        assert ("shop/m.paid is not connected" in report.faults) is consume
        store.broken = False
        await clinic.pass_time(SWEEP * 2)
        assert () == clinic.look().faults
        if consume:
            await clinic.bus.publish(Paid(), atomic=False)
            await turns()
            assert clinic.handled == 1


@pytest.mark.parametrize("consume", [True, False])
async def test_store_that_falls_silent(consume: bool) -> None:
    """A database that never answers, which no error tells, is red within two sweeps; so is each source stuck in it."""
    store = Ward()
    async with stored(store).open(consume) as clinic:
        await clinic.pass_time(SWEEP * 2)
        store.silent = anyio.Event()
        await clinic.pass_time(SWEEP - 0.1)
        assert clinic.look().healthy
        await clinic.pass_time(SWEEP + 0.1)
        assert "the store has not answered for 10 s" in clinic.look().faults
        assert not clinic.look().alive
        await clinic.pass_time(SWEEP)
        stuck = [fault for fault in clinic.look().faults if "is stuck" in fault]
        assert ["shop/m.paid is stuck: the store has not answered it for 10 s"] * consume == stuck
        store.silent.set()
        store.silent = None
        await clinic.pass_time(SWEEP)
        assert () == clinic.look().faults


async def test_settling_that_falls_silent() -> None:
    """A store that answers all but the settlements is red, because no handler gets on."""
    store = Ward()
    async with stored(store).open() as clinic:
        store.unsettled = anyio.Event()
        await clinic.bus.publish(Paid(), atomic=False)
        await clinic.pass_time(SWEEP * 2 - 0.1)
        before = clinic.look()
        await clinic.pass_time(0.1)
        after = clinic.look()
        store.unsettled.set()
        await clinic.pass_time(SWEEP)
        assert before.healthy
        assert (("settling is stuck: the store has not answered for 10 s",), False) == (after.faults, after.alive)
        assert () == clinic.look().faults


@pytest.mark.parametrize("exclusive", [True, False])
async def test_who_waits_for_the_only_writer_is_not_stuck(exclusive: bool) -> None:
    """As long as the only writer of a store works for somebody, the others wait for their turn; then it is silent."""
    store = Ward()
    store.exclusive = exclusive
    async with stored(store).open() as clinic:
        store.silent = anyio.Event()
        for _ in range(4):
            await clinic.pass_time(SWEEP)
            async with clinic.bus.transaction():
                await clinic.bus.publish(Paid())
        busy = clinic.look()
        await clinic.pass_time(SWEEP * 2)
        silent = clinic.look()
        store.silent.set()
        store.silent = None
        await clinic.pass_time(SWEEP)
        assert (exclusive, False) == (busy.alive, silent.alive)
        assert () == clinic.look().faults


async def test_busy_is_not_stuck() -> None:
    """A source whose slots are all taken asks the store for nothing, for as long as it takes, and is well."""
    clinic = stored(Ward(), limits=Limits(sweep=SWEEP, concurrency=1))
    clinic.gate = anyio.Event()
    async with clinic.open():
        await clinic.bus.publish(Paid(), atomic=False)
        await clinic.pass_time(SWEEP * 10)
        (source,) = clinic.look().sources.values()
        assert (1, None, ()) == (source.running, source.waited, clinic.look().faults)
        assert source.age is not None
        assert source.age >= SWEEP
        clinic.gate.set()


@pytest.mark.parametrize("place", ["subscribe", "receive", "open"])
async def test_subscription_that_is_gone(place: str) -> None:
    """A queue that was deleted, or a link that broke, is red while nobody is registered there, and heals."""
    transport = Flaky()
    async with Clinic(transports={"events": transport}, routes={Paid: "events"}).open() as clinic:
        assert clinic.look().healthy
        (source,) = clinic.look().sources.values()
        assert source.age is None
        transport.trouble[place] = transport.trouble["subscribe"] = lambda _: Lost("the queue is gone")
        if place == "open":
            clinic.bus.engine.links["events"]._lost(clinic.bus.engine.links["events"]._up)
        transport.lose("the queue is gone")
        await clinic.pass_time(SWEEP)
        report = clinic.look()
        assert "t.paid@shop/m.paid is not connected" in report.faults
        assert report.alive
        assert ("transport events is not open" in report.faults) is (place == "open")
        transport.trouble = {}
        await clinic.pass_time(30)
        assert () == clinic.look().faults
        await clinic.bus.publish(Paid())
        await turns()
        await clinic.pass_time(3)
        (source,) = clinic.look().sources.values()
        assert (1, 3.0) == (clinic.handled, source.age)


async def test_subscribing_that_hangs() -> None:
    """A source that waits for its subscription is not connected, however long it takes."""
    transport, gate = Flaky(), anyio.Event()
    async with Clinic(transports={"events": transport}, routes={Paid: "events"}).open() as clinic:
        transport.hooks["subscribe"] = gate.wait
        transport.lose("the queue is gone")
        await clinic.pass_time(SWEEP * 10)
        assert ("t.paid@shop/m.paid is not connected",) == clinic.look().faults
        gate.set()
        await turns()
        assert () == clinic.look().faults


async def test_loops_that_have_ended() -> None:
    """A source whose loops have ended is red, whatever it says of its subscription."""
    async with Clinic(routes={Paid: "memory"}).open() as clinic:
        assert clinic.bus.engine.worker is not None
        (channel,) = clinic.bus.engine.worker.channels
        assert clinic.look().healthy
        channel.slots.cancel()
        await turns()
        assert ("t.paid@shop/m.paid: its loops have ended",) == clinic.look().faults
        assert not clinic.look().alive


async def test_handler_with_too_many_dead_is_paused() -> None:
    """A handler that stands still because of its dead is red until some of them are gone."""
    clinic = stored(Ward(), limits=Limits(sweep=SWEEP, dead=1))
    clinic.error = Reject("never")
    async with clinic.open():
        await clinic.bus.publish(Paid(), atomic=False)
        await clinic.pass_time(SWEEP * 2)
        assert (("shop/m.paid is paused",), True) == (clinic.look().faults, clinic.look().alive)
        assert (await clinic.examine()).backlog == {
            "shop/m.paid": {"waiting": 0, "dead": 1, "oldest": None, "announced": True}
        }
        await clinic.bus.dead.discard(message=Paid)
        await clinic.pass_time(SWEEP * 2)
        assert () == clinic.look().faults


async def test_destination_that_takes_nothing_is_paused() -> None:
    """A destination that refuses while its link is up is red as long as it does."""
    transport = Flaky()
    clinic = Clinic(store=Ward(), transports={"events": transport}, routes={Told: "events"})
    async with clinic.open():
        transport.trouble["publish"] = lambda _: Lost("no exchange")
        await clinic.bus.publish(Told(), atomic=False)
        await clinic.pass_time(SWEEP)
        assert {"events": True} == dict(clinic.look().transports)
        assert ("shop>events is paused",) == clinic.look().faults
        transport.trouble = {}
        while not transport.log:
            await clinic.pass_time(0.1)
        assert () == clinic.look().faults
        assert [("publish", "t.told")] == [entry[:2] for entry in transport.log]


async def test_destination_with_too_many_dead_is_paused() -> None:
    """What goes out through a transport stands still at its ceiling of dead too, and is red until some are gone."""
    transport = Flaky()
    clinic = Clinic(
        store=Ward(), transports={"events": transport}, routes={Told: "events"}, limits=Limits(sweep=SWEEP, dead=1)
    )
    async with clinic.open():
        transport.trouble["publish"] = lambda _: PublishError({0: Refused("too large")})
        await clinic.bus.publish(Told(), atomic=False)
        await clinic.pass_time(SWEEP * 12)
        assert ("shop>events is paused",) == clinic.look().faults
        await clinic.bus.dead.discard(message=Told)
        await clinic.pass_time(SWEEP * 2)
        assert () == clinic.look().faults


async def test_pause_that_another_process_ended() -> None:
    """A process whose postponed message another one has published does not stay red for it."""
    transport = Flaky()
    store = Ward()
    clinic = Clinic(store=store, transports={"events": transport}, routes={Told: "events"})
    async with clinic.open():
        transport.trouble["publish"] = lambda _: Lost("no exchange")
        await clinic.bus.publish(Told(), atomic=False)
        await clinic.pass_time(0)
        assert ("shop>events is paused",) == clinic.look().faults
        assert await store.forget("shop>events") == 1
        await clinic.pass_time(10 + SWEEP)
        assert () == clinic.look().faults


# what waits


async def test_what_waits_is_counted() -> None:
    """A report that is asked for tells what waits for each handler, since when, and what is dead."""
    clinic = stored(Ward(), limits=Limits(sweep=SWEEP, concurrency=1))
    clinic.gate = anyio.Event()
    async with clinic.open():
        for _ in range(3):
            await clinic.bus.publish(Paid(), atomic=False)
        await clinic.pass_time(SWEEP * 2)
        report = await clinic.examine()
        clinic.gate.set()
        assert report.backlog == {"shop/m.paid": {"waiting": 3, "dead": 0, "oldest": SWEEP * 2, "announced": True}}
        assert report.healthy
        assert json.loads(json.dumps(report.as_dict()))["backlog"] == report.backlog
        assert clinic.look().backlog is None


async def test_backlog_is_counted_once_a_sweep() -> None:
    """However often health is asked for, the store counts once a sweep."""
    store = Ward()
    async with stored(store).open() as clinic:
        for _ in range(5):
            await clinic.examine()
        assert store.asked == 1
        await clinic.pass_time(SWEEP)
        await clinic.examine()
        assert store.asked == 2


async def test_backlog_without_consumer() -> None:
    """What waits for a handler that nobody announces, or for a transport that there is none of, is red at once."""
    store = Ward()
    async with stored(store).open() as clinic:
        assert (await clinic.examine()).healthy
        await clinic.pass_time(SWEEP)
        recipients = ("shop/m.gone", "shop>gone", "other>gone", "shop>memory")
        await store.add([NewEntry("1", "t.paid", b"{}", recipients=tuple(map(Recipient, recipients)))])
        report = await clinic.examine()
        assert not report.healthy
        assert (
            "shop/m.gone: 1 wait and nobody has announced it for a day",
            "shop>gone: 1 wait and this bus has no such transport",
        ) == report.faults
        assert clinic.look().healthy
        await store.forget("shop/m.gone")
        await store.forget("shop>gone")
        await clinic.pass_time(SWEEP)
        assert (await clinic.examine()).healthy


@pytest.mark.parametrize("how", ["broken", "silent"])
async def test_backlog_that_cannot_be_read(how: str) -> None:
    """A store that cannot say what waits is red at once, without a word of its own, or after a sweep."""
    store, reports = Ward(), list[Health]()
    async with stored(store).open() as clinic, anyio.create_task_group() as group:
        if how == "broken":
            store.broken = True
        else:
            store.silent = anyio.Event()

        async def ask() -> None:
            reports.append(await clinic.examine())

        group.start_soon(ask)
        await clinic.pass_time(SWEEP)
        if store.silent is not None:
            store.silent.set()
        (report,) = reports
        assert (False, None) == (report.healthy, report.backlog)
        word = "in time" if how == "silent" else "StoreError"
        assert any(fault.startswith("the store cannot be read") and word in fault for fault in report.faults)
        assert "hunter2" not in json.dumps(report.as_dict())


async def test_health_in_a_harness() -> None:
    """Hours on the harness's clock, where nothing has to be looked for, are no silence."""
    clinic = stored(MemoryStore())
    async with harness(clinic.bus) as t:
        await t.advance(7_200)
        assert () == clinic.look().faults
        await t.publish(Paid())
        await t.settled()
        await t.advance(7_200)
        assert () == (await clinic.examine()).faults


async def test_health_of_a_bus_that_does_not_run() -> None:
    """A bus that does not run says so, and nothing is asked."""
    report = await stored(Ward()).examine()
    assert (False, ("the bus is not started",), None, None) == (
        report.healthy, report.faults, report.backlog, report.answered,
    )  # fmt: skip


# a real one


@pytest.fixture
def own_postgres(absent: Any) -> Iterator[Server]:
    """Return a PostgreSQL that may be stopped."""
    with provide(lambda: recipe(durable=True), absent) as server:
        yield server


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_database_that_is_stopped(own_postgres: Server) -> None:
    """While the database is down the health route answers 503, in sentences without its address; then 200 again."""
    module, handled = Module("m"), list[str]()

    @module.on(Paid)
    async def paid(event: Paid) -> None:
        handled.append(event.account)

    with database(own_postgres) as url:
        bus = EventBus(
            module, name="shop", store=f"{url}?create=true", routes={Paid: "store"}, limits=Limits(sweep=0.3, drain=3)
        )
        app = FastAPI()
        install(app, bus, health="/health/bus")
        client = AsyncClient(transport=ASGITransport(app), base_url="http://test")

        async def becomes(code: int, because: str = "") -> Any:
            with anyio.fail_after(30):
                while True:
                    answer = await client.get("/health/bus")
                    faults = answer.json()["faults"]
                    if answer.status_code == code and (not because or any(one.startswith(because) for one in faults)):
                        return answer.json()
                    await anyio.sleep(0.05)

        async with client, app.router.lifespan_context(app):
            assert (await becomes(200))["backlog"]["shop/m.paid"]["announced"]
            await run_sync(own_postgres.stop)
            down = await becomes(503, "the store")
            assert str(own_postgres.port) not in json.dumps(down)
            await run_sync(own_postgres.start)
            assert (await becomes(200))["faults"] == []
            await bus.publish(Paid(account="b"), atomic=False)
            with anyio.fail_after(20):
                while not handled:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
    assert handled == ["b"]
