"""Eight bugs that tests do not find by themselves, each in a small application, and each mended.

``BUGS[name]`` is a function that takes the path of a file that does not exist yet and says whether the bug is in; it
returns a bus and a test of it, which is an async function of the harness.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
from anyio.lowlevel import checkpoint

from eventbus import Command, Context, Event, EventBus, Module, Transaction, message
from eventbus.stores.sqlite import SQLiteSession, SQLiteStore
from eventbus.testing import Harness

Test = Callable[[Harness], Awaitable[None]]
Bug = Callable[[Path, bool], tuple[EventBus, Test]]

BUGS: dict[str, Bug] = {}


def planted(bug: Bug) -> Bug:
    """Add a bug."""
    BUGS[bug.__name__] = bug
    return bug


class Placed(Event, name="p.placed", key="order"):
    """State that an order was placed."""

    order: int
    price: int = 10


class Shipped(Event, name="p.shipped", key="order"):
    """State that an order was shipped."""

    order: int


class Place(Command[None], name="p.place"):
    """Ask to place an order."""

    order: int


def ledger(path: Path, *modules: Module) -> EventBus:
    """Return a bus with a store in which handlers keep their rows."""
    return EventBus(*modules, name="shop", store=SQLiteStore(path, synchronous="normal"), routes={"p.*": "store"})


async def table(bus: EventBus) -> None:
    """Make the table of the ledger."""
    async with bus.transaction() as tx:
        await tx.session.execute("CREATE TABLE sale (number INTEGER, price INTEGER)")
        await tx.session.execute("INSERT INTO sale VALUES (0, 0)")


async def total(bus: EventBus) -> int:
    """Return what was sold for."""
    async with bus.transaction() as tx:
        return (await tx.session.fetchone("SELECT sum(price) FROM sale"))[0]


ADD = "INSERT INTO sale VALUES (?, ?)"


@planted
def not_idempotent(path: Path, buggy: bool) -> tuple[EventBus, Test]:
    """Add to what was sold whenever an order comes, also when it comes again."""
    module = Module("m")

    if buggy:

        @module.on(Placed)
        async def book(event: Placed, bus: EventBus) -> None:
            async with bus.transaction() as tx:
                await tx.session.execute(ADD, (event.order, event.price))
    else:

        @module.on(Placed)
        async def book(event: Placed, tx: Transaction[SQLiteSession]) -> None:
            await tx.session.execute(ADD, (event.order, event.price))

    bus = ledger(path, module)

    async def test(t: Harness) -> None:
        await table(bus)
        for order in (1, 2):
            await t.publish(Placed(order=order))
        await t.settled()
        assert await total(bus) == 20

    return bus, test


@planted
def order_assumed(path: Path, buggy: bool) -> tuple[EventBus, Test]:
    """Take it for granted that an order is known before it is shipped."""
    module, known, shipped = Module("m"), set[int](), set[int]()

    @module.on(Placed)
    async def place(event: Placed) -> None:
        known.add(event.order)

    @module.on(Shipped)
    async def ship(event: Shipped) -> None:
        if buggy and event.order not in known:
            return
        known.add(event.order)  # whichever of the two comes first
        shipped.add(event.order)

    bus = EventBus(module, routes={"p.*": "memory"})

    async def test(t: Harness) -> None:
        for order in (1, 2, 3):
            await t.publish(Placed(order=order))
            await t.publish(Shipped(order=order))
        await t.settled()
        assert shipped == {1, 2, 3}

    return bus, test


@planted
def lost_update(path: Path, buggy: bool) -> tuple[EventBus, Test]:
    """Read a number, wait, and write it back with something added."""
    module = Module("m")
    stock, seen = {"left": 100}, set[int]()
    guard = anyio.Lock()

    @module.on(Placed)
    async def take(event: Placed) -> None:
        async with nullcontext() if buggy else guard:
            if event.order not in seen:
                seen.add(event.order)
                left = stock["left"]
                await checkpoint()
                stock["left"] = left - 1

    bus = EventBus(module, routes={"p.*": "memory"})

    async def test(t: Harness) -> None:
        for order in range(4):
            await t.publish(Placed(order=order))
        await t.settled()
        assert stock["left"] == 96

    return bus, test


@message(name="p.filed")
@dataclass
class Filed:
    """State that a paper was filed; its labels can be anything."""

    number: int
    labels: Any = field(default_factory=list[str])


class Labels:
    """Hold labels in a way that only Python knows."""

    def __iter__(self) -> Iterator[str]:
        return iter(("red", "blue"))


@planted
def unserialisable(path: Path, buggy: bool) -> tuple[EventBus, Test]:
    """Put something into an event that no JSON can hold, while it is still handled inline."""
    module, labels = Module("m"), list[str]()

    @module.on(Filed)
    async def file(event: Filed) -> None:
        labels.extend(sorted(event.labels))

    bus = EventBus(module)

    async def test(t: Harness) -> None:
        await t.publish(Filed(1, labels=Labels() if buggy else ["red", "blue"]))
        assert labels == ["blue", "red"]

    return bus, test


@planted
def mutable_shared(path: Path, buggy: bool) -> tuple[EventBus, Test]:
    """Leave something in an event for the next handler of it."""
    module, found = Module("m"), list[list[str]]()

    @module.on(Filed)
    async def label(event: Filed) -> None:
        if buggy:
            event.labels.append("late")

    @module.on(Filed)
    async def read(event: Filed) -> None:
        await checkpoint()
        found.append([*event.labels, *([] if buggy else ["late"])])

    bus = EventBus(module)

    async def test(t: Harness) -> None:
        await t.publish(Filed(1))
        assert found == [["late"]]

    return bus, test


@planted
def published_outside(path: Path, buggy: bool) -> tuple[EventBus, Test]:
    """Tell the others before the row is committed, and without it."""
    module, told = Module("m"), list[int]()

    if buggy:

        @module.handles(Place)
        async def place(cmd: Place, bus: EventBus) -> None:
            await bus.publish(Placed(order=cmd.order), atomic=False)
            async with bus.transaction() as tx:
                await tx.session.execute("DELETE FROM sale WHERE number = ?", (cmd.order,))
                await tx.session.execute(ADD, (cmd.order, 10))
    else:

        @module.handles(Place)
        async def place(cmd: Place, bus: EventBus, tx: Transaction[SQLiteSession]) -> None:
            await tx.session.execute(ADD, (cmd.order, 10))
            await bus.publish(Placed(order=cmd.order))

    @module.on(Placed)
    async def tell(event: Placed, tx: Transaction[SQLiteSession]) -> None:
        await tx.session.execute(ADD, (-event.order, 0))

    bus = ledger(path, module)

    async def test(t: Harness) -> None:
        await table(bus)
        await t.enqueue(Place(order=1))
        await t.settled()
        async with bus.transaction() as tx:
            told[:] = [number for (number,) in await tx.session.fetchall("SELECT number FROM sale ORDER BY number")]
        assert told == [-1, 0, 1]

    return bus, test


_tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


@planted
def context_variable(path: Path, buggy: bool) -> tuple[EventBus, Test]:
    """Ask a variable of the publisher's context who it is for."""
    module, seen = Module("m"), set[str]()

    @module.handles(Place)
    async def place(cmd: Place, bus: EventBus) -> None:
        _tenant.set("acme")
        await bus.publish(Placed(order=cmd.order), headers={"tenant": "acme"})

    @module.on(Placed)
    async def note(event: Placed, ctx: Context) -> None:
        seen.add(_tenant.get() if buggy else ctx.headers["tenant"])

    bus = EventBus(module, routes={Placed: "memory"})

    async def test(t: Harness) -> None:
        await t.send(Place(order=1))
        await t.settled()
        assert seen == {"acme"}

    return bus, test


@planted
def blocking(path: Path, buggy: bool) -> tuple[EventBus, Test]:
    """Wait in a way that lets nobody else go on."""
    module, done = Module("m"), set[int]()

    if buggy:

        @module.on(Placed)
        async def wait(event: Placed) -> None:
            time.sleep(0.15)  # noqa: ASYNC251 - that is the bug
            done.add(event.order)
    else:

        @module.on(Placed)
        def wait(event: Placed) -> None:
            time.sleep(0.002)
            done.add(event.order)

    bus = EventBus(module, routes={"p.*": "memory"})

    async def test(t: Harness) -> None:
        await t.publish(Placed(order=1))
        await t.settled()
        assert done == {1}

    return bus, test
