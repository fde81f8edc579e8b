"""Prove that what is published in a transaction leaves with it, or not at all."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import Depends, FastAPI, HTTPException

from eventbus import (
    Command,
    Context,
    Event,
    EventBus,
    Limits,
    Module,
    NoTransactionError,
    Reject,
    Retry,
    StoreError,
    Transaction,
    TransactionClosedError,
    WiringError,
)
from eventbus.fastapi import BusDep, TransactionDep, install
from eventbus.stores.memory import MemoryStore
from eventbus.stores.sqlite import SQLiteSession, SQLiteStore
from eventbus.testing.harness import Harness, harness

Tx = Transaction[SQLiteSession]


class Place(Command[int], name="t.place"):
    """Ask for an order."""

    number: int


class Placed(Event, name="t.placed"):
    """State that an order was placed."""

    number: int


class Noted(Event, name="t.noted"):
    """State something that is handled inline."""

    number: int


class Shop:
    """Hold a bus on a file of its own, with what its handlers saw."""

    def __init__(self, path: Path) -> None:
        self.seen: list[Any] = []
        self.module = Module("shop", messages=[Placed, Noted])
        self.store = SQLiteStore(path)
        self.bus = EventBus(self.module, name="test", store=self.store, routes={"t.placed": "store"})

    async def numbers(self, t: Harness) -> list[int]:
        """Return what is in the table of orders."""
        async with t.bus.transaction() as tx:
            rows = await tx.session.fetchall("SELECT number FROM orders ORDER BY number")
        return [number for (number,) in rows]


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Return a bus with a handler that notes what was placed."""
    shop = Shop(tmp_path / "shop.db")

    @shop.module.on(Placed)
    async def note(event: Placed) -> None:
        shop.seen.append(event.number)

    return shop


@pytest.fixture
async def t(shop: Shop) -> AsyncIterator[Harness]:
    """Run the bus of the shop, with its table."""
    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
        yield t


def insert(tx: Tx, number: int) -> Any:
    """Return the insertion of an order."""
    return tx.session.execute("INSERT INTO orders VALUES (?)", (number,))


async def test_commit_takes_rows_and_events_together(shop: Shop, t: Harness) -> None:
    """What was published in a transaction is handled after its commit, not before."""
    async with shop.bus.transaction() as tx:
        await insert(tx, 1)
        await shop.bus.publish(Placed(number=1))
        await anyio.lowlevel.checkpoint()
        assert shop.seen == []
    await t.settled()
    assert [1] == shop.seen
    assert [1] == await shop.numbers(t)


async def test_rollback_takes_rows_and_events_together(shop: Shop, t: Harness) -> None:
    """An exception in the block leaves neither the row nor the event."""
    with pytest.raises(ZeroDivisionError):
        async with shop.bus.transaction() as tx:
            await insert(tx, 1)
            await shop.bus.publish(Placed(number=1))
            raise ZeroDivisionError
    await t.settled()
    assert [] == shop.seen
    assert [] == await shop.numbers(t)
    assert [] == t.published(Placed)


async def test_savepoint_takes_its_events_with_it(shop: Shop, t: Harness) -> None:
    """A nested transaction that fails takes back what it published, and nothing else."""
    async with shop.bus.transaction() as tx:
        await insert(tx, 1)
        await shop.bus.publish(Placed(number=1))
        with pytest.raises(ZeroDivisionError):
            async with shop.bus.transaction() as inner:
                assert inner is tx
                await insert(tx, 2)
                await shop.bus.publish(Placed(number=2))
                raise ZeroDivisionError
        async with shop.bus.transaction():
            await insert(tx, 3)
            await shop.bus.publish(Placed(number=3))
    await t.settled()
    assert [1, 3] == sorted(shop.seen)
    assert [1, 3] == await shop.numbers(t)


async def test_publish_outside_a_transaction_is_refused(shop: Shop) -> None:
    """A durable publish without a transaction is an error that names both cures."""
    async with shop.bus.running():
        with pytest.raises(NoTransactionError, match=r"bus\.transaction.*atomic=False"):
            await shop.bus.publish(Placed(number=1))
        await shop.bus.publish(Placed(number=2), atomic=False)
        async with shop.bus.transaction():
            await shop.bus.publish(Placed(number=3), atomic=False)
    async with harness(shop.bus) as t:
        await t.settled()
    assert [2, 3] == sorted(shop.seen)


async def test_atomic_false_joins_the_open_transaction(shop: Shop, t: Harness) -> None:
    """``atomic=False`` waives the check only: with a transaction open it joins."""
    with pytest.raises(ZeroDivisionError):
        async with shop.bus.transaction():
            await shop.bus.publish(Placed(number=1), atomic=False)
            raise ZeroDivisionError
    await t.settled()
    assert [] == shop.seen


async def test_transaction_that_is_over_refuses(shop: Shop, t: Harness) -> None:
    """A task that outlived its transaction cannot publish into it, nor use its session."""
    over, told = anyio.Event(), anyio.Event()
    errors: list[Exception] = []

    async def late(tx: Tx) -> None:
        await over.wait()
        for attempt in (lambda: shop.bus.publish(Placed(number=1)), lambda: insert(tx, 1)):
            try:
                await attempt()
            except TransactionClosedError as error:
                errors.append(error)
        told.set()

    async with anyio.create_task_group() as group:
        async with shop.bus.transaction() as tx:
            group.start_soon(late, tx)
            await anyio.lowlevel.checkpoint()
        over.set()
        await told.wait()
    assert 2 == len(errors)
    await t.settled()
    assert [] == shop.seen


async def test_command_handler_gets_a_transaction_of_its_own(tmp_path: Path) -> None:
    """A handler that takes Transaction has its rows and events committed before send returns, or neither."""
    shop = Shop(tmp_path / "shop.db")

    @shop.module.handles(Place)
    async def place(cmd: Place, tx: Tx, bus: EventBus) -> int:
        await insert(tx, cmd.number)
        await bus.publish(Placed(number=cmd.number))
        if cmd.number == 13:
            raise ValueError("unlucky")
        return cmd.number * 2

    @shop.module.on(Placed)
    async def note(event: Placed) -> None:
        shop.seen.append(event.number)

    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
        assert 2 == await t.send(Place(number=1))
        with pytest.raises(ValueError, match="unlucky"):
            await t.send(Place(number=13))
        await t.settled()
        assert [1] == await shop.numbers(t)
    assert [1] == shop.seen


async def test_command_handler_joins_the_open_transaction(tmp_path: Path) -> None:
    """Inside a transaction a handler that takes Transaction joins it, and its failure is only its own."""
    shop = Shop(tmp_path / "shop.db")

    @shop.module.handles(Place)
    async def place(cmd: Place, tx: Tx) -> int:
        await insert(tx, cmd.number)
        if cmd.number == 13:
            raise ValueError("unlucky")
        return cmd.number

    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
            await t.send(Place(number=1))
            with pytest.raises(ValueError, match="unlucky"):
                await t.send(Place(number=13))
            assert [(1,)] == await tx.session.fetchall("SELECT number FROM orders")
        with pytest.raises(ZeroDivisionError):
            async with shop.bus.transaction():
                await t.send(Place(number=2))
                raise ZeroDivisionError
        assert [1] == await shop.numbers(t)


async def test_inline_handlers_run_in_the_transaction_one_by_one(tmp_path: Path) -> None:
    """Inline handlers with Transaction run in order, each in a savepoint; one that fails takes only its own back."""
    shop = Shop(tmp_path / "shop.db")

    @shop.module.on(Noted, name="first")
    async def first(event: Noted, tx: Tx) -> None:
        await insert(tx, event.number)
        await anyio.lowlevel.checkpoint()
        shop.seen.append("first")

    @shop.module.on(Noted, name="second")
    async def second(event: Noted, tx: Tx) -> None:
        await insert(tx, event.number + 1)
        shop.seen.append("second")
        raise ValueError("no")

    @shop.module.on(Noted, name="third")
    async def third(event: Noted, tx: Tx) -> None:
        await insert(tx, event.number + 2)
        shop.seen.append("third")

    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
            with pytest.raises(ExceptionGroup) as caught:
                await shop.bus.publish(Noted(number=1))
        assert ["first", "second", "third"] == shop.seen
        assert [1, 3] == await shop.numbers(t)
        assert "in handler shop.second of t.noted" in caught.value.exceptions[0].__notes__
        with pytest.raises(ExceptionGroup):
            await t.publish(Noted(number=10))
        assert [1, 3, 10, 12] == await shop.numbers(t)


async def test_stored_handler_settles_in_its_transaction(tmp_path: Path) -> None:
    """A stored handler's rows, events and its being done are one commit; a failed attempt leaves nothing."""
    shop = Shop(tmp_path / "shop.db")

    @shop.module.on(Placed, retry=Retry(attempts=3, initial=1.0, jitter=False))
    async def book(event: Placed, ctx: Context, tx: Tx, bus: EventBus) -> None:
        await insert(tx, event.number)
        await bus.publish(Noted(number=event.number))
        if ctx.attempt < 3:
            raise ValueError("not yet")

    @shop.module.on(Noted)
    async def noted(event: Noted) -> None:
        shop.seen.append(event.number)

    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
            await shop.bus.publish(Placed(number=7))
        await t.settled()
        assert [] == await shop.numbers(t)
        await t.advance(60)
        assert [7] == await shop.numbers(t)
        assert [] == t.dead
        assert len(t.failed("shop.book")) == 2
    assert [Noted(number=7)] == t.published(Noted)


async def test_reject_and_dead_and_replay(tmp_path: Path) -> None:
    """A rejected message is dead at once with its reason, and a replay handles it anew."""
    shop = Shop(tmp_path / "shop.db")
    healed = False

    @shop.module.on(Placed)
    async def book(event: Placed, tx: Tx) -> None:
        await insert(tx, event.number)
        if not healed:
            raise Reject("card stolen")

    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
            await shop.bus.publish(Placed(number=7))
        await t.settled()
        assert ["Reject: card stolen"] == [entry.error for entry in t.dead]
        assert b'{"number":7}' == t.dead[0].body
        healed = True
        assert 1 == await shop.bus.dead.replay(handler="shop.book")
        assert 0 == await shop.bus.dead.replay(handler="shop.book")
        await t.settled()
        assert [] == t.dead
        assert [7] == await shop.numbers(t)


async def test_delay_is_kept_by_the_store(shop: Shop, t: Harness) -> None:
    """A delayed message is handled when it is due, not before."""
    async with shop.bus.transaction():
        await shop.bus.publish(Placed(number=1), delay=3600.0)
    await t.advance(3599)
    assert [] == shop.seen
    await t.advance(1)
    assert [1] == shop.seen


async def test_stream_is_fed_after_commit_only(shop: Shop, t: Harness) -> None:
    """A live stream sees what was committed, and nothing of what was rolled back."""
    async with shop.bus.stream(Placed) as events:
        with pytest.raises(ZeroDivisionError):
            async with shop.bus.transaction():
                await shop.bus.publish(Placed(number=1))
                raise ZeroDivisionError
        async with shop.bus.transaction():
            await shop.bus.publish(Placed(number=2))
        assert Placed(number=2) == await anext(events)
    await t.settled()


async def test_memory_route_in_a_transaction_waits_for_its_commit(tmp_path: Path) -> None:
    """What is routed to memory inside a transaction is queued after the commit, and not at all after a rollback."""
    shop = Shop(tmp_path / "shop.db")
    bus = EventBus(shop.module, name="test", store=shop.store, routes={"t.noted": "memory"})

    @shop.module.on(Noted)
    async def noted(event: Noted) -> None:
        shop.seen.append(event.number)

    async with harness(bus) as t:
        with pytest.raises(ZeroDivisionError):
            async with bus.transaction():
                await bus.publish(Noted(number=1))
                raise ZeroDivisionError
        async with bus.transaction():
            await bus.publish(Noted(number=2))
            await t.settled()
            assert [] == shop.seen
        await t.settled()
    assert [2] == shop.seen


async def test_dependency_takes_the_transaction(tmp_path: Path) -> None:
    """A dependency may take Transaction, and it is the handler's."""
    shop = Shop(tmp_path / "shop.db")

    class Repository:
        def __init__(self, tx: Tx) -> None:
            self.tx = tx

    @shop.module.handles(Place)
    async def place(cmd: Place, tx: Tx, repository: Annotated[Repository, Depends(Repository)]) -> int:
        return int(repository.tx is tx)

    async with harness(shop.bus) as t:
        assert 1 == await t.send(Place(number=1))


def test_transaction_needs_a_store_and_the_right_session() -> None:
    """A handler that takes a Transaction the bus cannot give is a fault that says so."""
    module = Module("shop")

    @module.on(Noted)
    async def noted(event: Noted, tx: Transaction[SQLiteSession]) -> None: ...

    with pytest.raises(WiringError, match="no store"):
        EventBus(module).compile()

    other = Module("other")

    @other.on(Noted)
    async def wants_another(event: Noted, tx: Transaction[Shop]) -> None: ...

    with pytest.raises(WiringError, match=r"Transaction\[Shop\], but the store's session is SQLiteSession"):
        EventBus(other, store="sqlite:///never.db").compile()


async def test_a_transaction_that_keeps_others_out_ends_within_a_third_of_the_lease(tmp_path: Path) -> None:
    """On SQLite a handler's transaction has a third of the lease, by default and at most."""
    shop = Shop(tmp_path / "shop.db")
    bus = EventBus(
        shop.module, name="test", store=shop.store, routes={"t.placed": "store"}, limits=Limits(lease=0.6, sweep=0.1)
    )

    @shop.module.on(Placed, retry=Retry(attempts=1))
    async def endless(event: Placed, tx: Tx) -> None:
        await insert(tx, event.number)
        await anyio.sleep_forever()

    async with bus.running():
        async with bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
            await bus.publish(Placed(number=1))
        worker = bus.engine.worker
        assert worker is not None
        with anyio.fail_after(20):
            while not (dead := await bus.dead.find()):
                await worker.changed.wait()
        assert ["within its timeout of 0.2 s" in entry.error for entry in dead] == [True]
        async with bus.transaction() as tx:
            assert [] == await tx.session.fetchall("SELECT number FROM orders")

    greedy = Shop(tmp_path / "shop.db")

    @greedy.module.on(Placed, timeout=10.5)
    async def too_long(event: Placed, tx: Tx) -> None: ...

    with pytest.raises(WiringError, match=r"timeout=10.5 is more than a third of the lease \(10 s\)"):
        greedy.bus.compile()


async def test_transaction_dep_commits_before_the_response(shop: Shop) -> None:
    """An endpoint's transaction is committed before its answer leaves; a failing endpoint leaves nothing."""
    app = FastAPI()
    install(app, shop.bus)

    @app.post("/orders/{number}", status_code=201)
    async def create(number: int, bus: BusDep, tx: TransactionDep[SQLiteSession]) -> int:
        await tx.session.execute("CREATE TABLE IF NOT EXISTS orders (number INTEGER)")
        await insert(tx, number)
        await bus.publish(Placed(number=number))
        if number == 13:
            raise HTTPException(409)
        return number

    async with harness(shop.bus, app=app) as t:
        assert 201 == (await t.client.post("/orders/1")).status_code
        assert 409 == (await t.client.post("/orders/13")).status_code
        assert [1] == await shop.numbers(t)
        await t.settled()
        assert [1] == shop.seen


class BrokenCommit(SQLiteStore):
    """Fail every commit while ``broken``."""

    broken = False

    @asynccontextmanager
    async def begin(self, session: object | None = None) -> AsyncIterator[Any]:
        """Open a transaction that cannot be committed while ``broken``."""
        async with super().begin(session) as unit:
            yield unit
            if self.broken:
                raise StoreError("the disk is gone")


async def test_failing_commit_is_a_failing_request(shop: Shop, tmp_path: Path) -> None:
    """A commit that fails answers with an error, and nothing is published."""
    store = BrokenCommit(tmp_path / "broken.db")
    bus = EventBus(shop.module, name="test", store=store, routes={"t.placed": "store"})
    app = FastAPI()
    install(app, bus)

    @app.post("/orders")
    async def create(bus: BusDep, tx: TransactionDep[SQLiteSession]) -> str:
        await bus.publish(Placed(number=1))
        store.broken = True
        return "never"

    async with harness(bus, app=app) as t:
        with pytest.raises(StoreError, match="the disk is gone"):
            await t.client.post("/orders")
        store.broken = False
        await t.settled()
        assert [] == t.published(Placed)
    assert [] == shop.seen


async def test_savepoints_side_by_side_take_turns(tmp_path: Path) -> None:
    """Of two handlers in one transaction at once, the one that fails takes nothing of the other with it."""
    shop = Shop(tmp_path / "shop.db")
    first_in = anyio.Event()

    @shop.module.handles(Place)
    async def place(cmd: Place, tx: Tx, bus: EventBus) -> int:
        await insert(tx, cmd.number)
        await bus.publish(Placed(number=cmd.number))
        first_in.set()
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        if cmd.number == 13:
            raise ValueError("unlucky")
        return cmd.number

    @shop.module.on(Placed)
    async def note(event: Placed) -> None:
        shop.seen.append(event.number)

    async def fail(t: Harness) -> None:
        with pytest.raises(ValueError, match="unlucky"):
            await t.send(Place(number=13))

    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
            async with anyio.create_task_group() as group:
                group.start_soon(fail, t)
                await first_in.wait()
                assert 7 == await t.send(Place(number=7))
        await t.settled()
        assert [7] == await shop.numbers(t)
        assert [Placed(number=7)] == t.published(Placed)
    assert [7] == shop.seen


async def test_a_failing_inline_handler_takes_nothing_of_its_siblings(tmp_path: Path) -> None:
    """What a sibling published while a handler's savepoint was open stays when that savepoint is rolled back."""
    shop = Shop(tmp_path / "shop.db")
    inside, published = anyio.Event(), anyio.Event()

    @shop.module.on(Noted, name="fails")
    async def fails(event: Noted, tx: Tx) -> None:
        await insert(tx, event.number)
        inside.set()
        await published.wait()
        raise ValueError("no")

    @shop.module.on(Noted, name="publishes")
    async def publishes(event: Noted, bus: EventBus) -> None:
        await inside.wait()
        await bus.publish(Placed(number=event.number))
        published.set()

    @shop.module.on(Placed)
    async def note(event: Placed) -> None:
        shop.seen.append(event.number)

    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
            with pytest.raises(ExceptionGroup):
                await shop.bus.publish(Noted(number=1))
        await t.settled()
        assert [] == await shop.numbers(t)
    assert [1] == shop.seen


class SlowCommit(SQLiteStore):
    """Tell when a commit begins, and wait before it ends."""

    committing: anyio.Event
    go_on: anyio.Event

    @asynccontextmanager
    async def begin(self, session: object | None = None) -> AsyncIterator[Any]:
        """Open a transaction whose commit can be held."""
        async with super().begin(session) as unit:
            yield unit
            self.committing.set()
            await self.go_on.wait()


async def test_what_follows_a_commit_follows_though_the_caller_is_cancelled(shop: Shop, tmp_path: Path) -> None:
    """A caller cancelled while its transaction commits does not part the commit from what was to follow it."""
    store = SlowCommit(tmp_path / "slow.db")
    store.committing, store.go_on = anyio.Event(), anyio.Event()
    handled = anyio.Event()
    module = Module("m")
    bus = EventBus(module, name="test", store=store, routes={"t.noted": "memory"})

    @module.on(Noted)
    async def noted(event: Noted) -> None:
        handled.set()

    async def publish() -> None:
        async with bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE orders (number INTEGER)")
            await bus.publish(Noted(number=1))

    async with bus.running():
        async with anyio.create_task_group() as group:
            group.start_soon(publish)
            await store.committing.wait()
            group.cancel_scope.cancel()
        store.go_on.set()
        with anyio.fail_after(20):
            await handled.wait()
        async with bus.transaction() as tx:
            assert [] == await tx.session.fetchall("SELECT number FROM orders")


async def test_what_follows_a_commit_is_all_done_though_some_of_it_fails(shop: Shop) -> None:
    """Of two streams of work after a commit, the one that fails does not stop the other."""
    done: list[str] = []

    async def fails() -> None:
        raise ValueError("no")

    async def works() -> None:
        done.append("done")

    async with shop.bus.running():
        with pytest.raises(ValueError, match="no") as caught:
            async with shop.bus.transaction():
                shop.bus.engine.entries.after_commit(fails)
                shop.bus.engine.entries.after_commit(works)
    assert ["done"] == done
    assert any("committed" in note for note in caught.value.__notes__)


async def test_what_transaction_returns_is_entered_once(shop: Shop, t: Harness) -> None:
    """Entering it again, inside itself or later, is refused, and what was open before is intact."""
    async with shop.bus.transaction() as tx:
        opening = shop.bus.transaction()
        async with opening:
            await insert(tx, 1)
        with pytest.raises(RuntimeError, match="entered once"):
            await opening.__aenter__()
    with pytest.raises(RuntimeError, match="entered once"):
        await opening.__aenter__()
    async with shop.bus.transaction() as tx:
        await insert(tx, 2)
    assert [1, 2] == await shop.numbers(t)


async def test_transaction_left_in_another_context_is_rolled_back(shop: Shop, t: Harness) -> None:
    """It fails loudly, keeps nothing, and keeps nobody out afterwards."""
    opening = shop.bus.transaction()

    async def enter() -> None:
        await insert(await opening.__aenter__(), 1)

    async with anyio.create_task_group() as group:
        group.start_soon(enter)
    with pytest.raises(ValueError, match="different Context"):
        await opening.__aexit__(None, None, None)
    with anyio.fail_after(5):
        async with shop.bus.transaction() as tx:
            await insert(tx, 2)
    assert [2] == await shop.numbers(t)


async def test_commit_that_the_end_of_the_bus_breaks_off_is_an_error() -> None:
    """Whoever waits for a commit that is given up hears that its outcome is not known."""
    committing, errors = anyio.Event(), list[Exception]()

    class Slow(MemoryStore):
        @asynccontextmanager
        async def begin(self, session: object | None = None) -> AsyncIterator[Any]:
            async with super().begin(session) as unit:
                yield unit
                committing.set()
                await anyio.sleep_forever()

    module = Module("m")
    module.on(Placed)(checkpoint_after)
    bus = EventBus(module, name="x", store=Slow(), routes={"t.placed": "memory"})

    async def commits() -> None:
        try:
            async with bus.transaction():
                await bus.publish(Placed(number=1))
        except StoreError as error:
            errors.append(error)

    async with anyio.create_task_group() as group, bus.running():
        group.start_soon(commits)
        await committing.wait()
    assert ["not known"] == [str(error)[-9:] for error in errors]


async def checkpoint_after(event: Placed) -> None:
    """Handle an event."""
    await anyio.lowlevel.checkpoint()
