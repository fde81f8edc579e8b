"""Prove P1, P2, P3 and P5 while the database server, or the connection to it, goes away in the middle."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from eventbus import Event, EventBus, Limits, Module, Retry, Transaction
from eventbus.errors import StoreError
from eventbus.stores.sqlalchemy import SQLAlchemyStore
from tests.crash.site import Site, until
from tests.servers.proxy import Fault, Proxy

pytestmark = [
    pytest.mark.crash,
    pytest.mark.long,
    pytest.mark.timeout(180),
    # A driver that has lost its connection leaves the socket to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EVENTS = 1_000
PUBLISHERS = 10
BROKEN = (StoreError, SQLAlchemyError, OSError)


class Sent(Event, name="crash.sent"):
    """State that something was sent."""

    number: int


class Count:
    """Count effects, and wake who waits for so many."""

    def __init__(self) -> None:
        self.value = 0
        self._changed = anyio.Event()

    def grow(self) -> None:
        """Count one more."""
        self.value += 1
        self._changed.set()

    async def reach(self, value: int, seconds: float) -> None:
        """Wait until there are so many."""
        with anyio.fail_after(seconds):
            while self.value < value:
                self._changed = anyio.Event()
                await self._changed.wait()


def effects(count: Count) -> Module:
    """Return a handler with one effect in its transaction."""
    module = Module("effects")

    @module.on(Sent, retry=Retry(attempts=1_000, initial=0.05, maximum=0.5), concurrency=4)
    async def effect(event: Sent, tx: Transaction[AsyncSession]) -> None:
        await tx.session.execute(text("INSERT INTO effects (number) VALUES (:number)"), {"number": event.number})
        count.grow()

    return module


@asynccontextmanager
async def running(url: str, module: Module, *, consume: bool = True, **limits: Any) -> AsyncIterator[EventBus]:
    """Run a bus on a database, as an application does that knows its connections may break."""
    engine = create_async_engine(url, pool_pre_ping=True)
    store = SQLAlchemyStore(engine, create=True)
    times = {"lease": 2.0, "sweep": 0.5, "drain": 5.0, **limits}
    bus = EventBus(module, name="crash", store=store, routes={"crash.*": "store"}, limits=Limits(**times))
    async with bus.running(consume=consume):
        yield bus
    await engine.dispose()


async def send(bus: EventBus, number: int) -> None:
    """Publish with a row of its own in the same transaction."""
    async with bus.transaction() as tx:
        await tx.session.execute(text("INSERT INTO made VALUES (:number)"), {"number": number})
        await bus.publish(Sent(number=number))


async def send_surely(bus: EventBus, number: int) -> None:
    """Publish again until it is sure; an error from the commit leaves it open whether it was done."""
    while True:
        try:
            await send(bus, number)
        except IntegrityError:
            return  # it was
        except BROKEN:
            await anyio.sleep(0.05)  # until the server is back
        else:
            return


def outcome(site: Site) -> tuple[list[int], list[int], int]:
    """Return what was made, what had an effect, and how many entries there are."""
    made = sorted(number for (number,) in site.rows("SELECT number FROM made"))
    had = sorted(number for (number,) in site.rows("SELECT number FROM effects"))
    return made, had, site.rows("SELECT COUNT(*) FROM eventbus_entry")[0][0]


@pytest.mark.parametrize("site", ["durable_postgres", "durable_mariadb"], indirect=True)
async def test_a_server_that_comes_back_has_lost_nothing(site: Site) -> None:
    """1,000 events of 10 publishers, the server restarted at a third and killed at half: each has its one effect."""
    assert site.server is not None
    server, numbers, count = site.server, iter(range(EVENTS)), Count()
    moments = {EVENTS // 3: server.restart, EVENTS // 2: lambda: (server.kill(), server.start())}

    async def publisher(bus: EventBus) -> None:
        for number in numbers:
            if number in moments:
                await anyio.to_thread.run_sync(moments[number])
            await send_surely(bus, number)

    async with running(site.database, effects(count)) as bus:
        async with anyio.create_task_group() as group:
            for _ in range(PUBLISHERS):
                group.start_soon(publisher, bus)
        await until(lambda: len(outcome(site)[1]) >= EVENTS, 60)
    assert outcome(site) == (list(range(EVENTS)), list(range(EVENTS)), EVENTS)


ENDS: tuple[Any, ...] = ("drop", "reset", "black-hole")
CUTS = [
    (Fault(does="delay", at=b"COMMIT", behind=b"INSERT INTO made", seconds=0.5, times=1), True),
    *(
        (Fault(does=does, at=b"COMMIT", behind=b"INSERT INTO made", passed=passed, times=1), passed)
        for does in ENDS
        for passed in (False, True)
    ),
]


@pytest.mark.parametrize("site", ["postgres", "mariadb"], indirect=True)
@pytest.mark.parametrize(("fault", "arrives"), CUTS, ids=[f"{cut.does}-{arrives}" for cut, arrives in CUTS])
async def test_a_commit_that_is_cut_off_is_whole_or_nothing(site: Site, fault: Fault, arrives: bool) -> None:
    """A publisher whose COMMIT is cut off does not know, but row, entry and effect agree, and it can go on."""
    assert site.server is not None
    count, calm = Count(), 60.0
    async with Proxy(site.server.port).running() as proxy, running(site.database, effects(count)):
        through = make_url(site.database).set(port=proxy.port).render_as_string(hide_password=False)
        async with running(through, Module("none", messages=[Sent]), consume=False, sweep=calm) as bus:
            await send(bus, 1)
            proxy.inject(fault)
            if fault.does == "delay":
                await send(bus, 2)
            elif fault.does == "black-hole":
                with anyio.move_on_after(1.0) as waiting:
                    await send(bus, 2)
                assert waiting.cancelled_caught
                proxy.heal()
            else:
                with pytest.raises(StoreError, match="not known"):
                    await send(bus, 2)
            assert proxy.strikes == 1
            await send(bus, 3)
            expected = [1, 2, 3] if arrives else [1, 3]
            await until(lambda: len(outcome(site)[1]) >= len(expected), 30)
    assert outcome(site) == (expected, expected, len(expected))


@pytest.mark.parametrize("site", ["postgres", "mariadb"], indirect=True)
@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("does", ENDS)
async def test_a_handler_whose_commit_is_cut_off_has_its_effect_once(site: Site, does: Any, passed: bool) -> None:
    """A handler whose COMMIT is cut off runs again only if it was not done; the effect is there once."""
    assert site.server is not None
    count, calm = Count(), 60.0
    async with Proxy(site.server.port).running() as proxy:
        through = make_url(site.database).set(port=proxy.port).render_as_string(hide_password=False)
        async with (
            running(through, effects(count), drain=1.0),
            running(site.database, Module("none", messages=[Sent]), consume=False, sweep=calm) as publisher,
        ):
            await send(publisher, 1)
            await count.reach(1, 30)
            await until(lambda: outcome(site)[1] == [1], 30)
            proxy.inject(Fault(does=does, at=b"COMMIT", behind=b"INSERT INTO effects", passed=passed, times=1))
            await send(publisher, 2)
            with anyio.fail_after(30):
                await proxy.struck()
            await anyio.sleep(0.2)  # so that the cut is felt before it is healed
            proxy.heal()
            await send(publisher, 3)
            await until(lambda: len(outcome(site)[1]) >= 3, 40)
    assert outcome(site) == ([1, 2, 3], [1, 2, 3], 3)
