"""Prove through the bus that what is published shares the fate of the user's own SQLAlchemy transaction."""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import pytest
import sqlmodel
from fastapi import Depends, FastAPI
from sqlalchemy import Column, Integer, MetaData, Table, delete, event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, registry, sessionmaker
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

from eventbus import (
    Command,
    Event,
    EventBus,
    Limits,
    Module,
    Retry,
    StoreError,
    Transaction,
    TransactionClosedError,
    WiringError,
)
from eventbus.fastapi import BusDep, TransactionDep, install
from eventbus.stores.sqlalchemy import SQLAlchemyStore
from eventbus.stores.sqlalchemy import metadata as ours
from eventbus.testing.harness import Harness, harness
from tests.stores.databases import CASES, Database, Databases, a_database, dispose

Tx = Transaction[Any]

ORDERS = Table("orders", MetaData(), Column("number", Integer, primary_key=True))

every_case = pytest.mark.parametrize(("kind", "anyio_backend"), CASES)
on_asyncio = pytest.mark.parametrize(("kind", "anyio_backend"), [case for case in CASES if case[0][:4] != "sync"])
on_postgresql = pytest.mark.parametrize(("kind", "anyio_backend"), [("psycopg", "asyncio")])


class Place(Command[int], name="t.place"):
    """Ask for an order."""

    number: int


class Placed(Event, name="t.placed"):
    """State that an order was placed; goes to the store."""

    number: int


class Told(Event, name="t.told"):
    """State something that waits in this process."""

    number: int


class Shop:
    """Hold a bus on a database, with what its handlers saw."""

    def __init__(self, engine: Any, **options: Any) -> None:
        self.engine = engine
        self.seen: list[Any] = []
        self.module = Module("shop", messages=[Placed, Told])
        self.store = SQLAlchemyStore(engine, create=True, **options)
        self.bus = EventBus(
            self.module, name="test", store=self.store, routes={"t.placed": "store", "t.told": "memory"}
        )

    def session(self) -> Any:
        """Return a session of the user's own."""
        return AsyncSession(self.engine) if isinstance(self.engine, AsyncEngine) else Session(self.engine)

    async def numbers(self) -> list[int]:
        """Return what is in the table of orders."""
        async with self.bus.transaction() as tx:
            return sorted(await done(tx.session.scalars(select(ORDERS.c.number))))


async def done(value: Any) -> Any:
    """Return what a session's method gives, whether it is a sync or an async one."""
    return await value if hasattr(value, "__await__") else value


async def place(session: Any, number: int) -> None:
    """Insert an order."""
    connection = await done(session.connection())
    await done(connection.execute(insert(ORDERS).values(number=number)))


@pytest.fixture(scope="module")
def databases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """Return how a test gets the database of a kind, made when it is first asked for."""
    made: dict[str, Database] = {}
    with ExitStack() as stack:

        def of(kind: str) -> Database:
            if kind not in made:
                made[kind] = stack.enter_context(a_database(kind, request, tmp_path_factory.mktemp("joining")))
                made[kind].run("CREATE TABLE orders (number INTEGER PRIMARY KEY)")
            return made[kind]

        yield of


@pytest.fixture
async def engine(kind: str, databases: Databases) -> AsyncIterator[Any]:
    """Return an engine of the user's on a database with empty tables."""
    database = databases(kind)
    database.wipe("DELETE FROM orders")
    engine = database.engine()
    yield engine
    await dispose(engine)


@pytest.fixture
def shop(engine: Any) -> Shop:
    """Return a bus with a handler that notes what was placed."""
    shop = Shop(engine)

    @shop.module.on(Placed)
    async def note(event: Placed) -> None:
        shop.seen.append(event.number)

    @shop.module.on(Told)
    async def hear(event: Told) -> None:
        shop.seen.append(-event.number)

    return shop


@pytest.fixture
async def t(shop: Shop) -> AsyncIterator[Harness]:
    """Run the bus of the shop."""
    async with harness(shop.bus) as t:
        yield t


@every_case
async def test_own_transaction(shop: Shop, t: Harness) -> None:
    """A transaction that the bus opens commits rows and events together, or neither."""
    async with shop.bus.transaction() as tx:
        await place(tx.session, 1)
        await shop.bus.publish(Placed(number=1))
    with pytest.raises(ZeroDivisionError):
        async with shop.bus.transaction() as tx:
            await place(tx.session, 2)
            await shop.bus.publish(Placed(number=2))
            raise ZeroDivisionError
    await t.settled()
    assert [1] == shop.seen
    assert [1] == await shop.numbers()


@every_case
async def test_joined_session_is_committed_by_its_owner(shop: Shop, t: Harness) -> None:
    """What is published in a joined session leaves with the owner's commit, stored or not, and not before."""
    session = shop.session()
    async with shop.bus.transaction(session) as tx:
        assert tx.session is session
        await place(session, 1)
        await shop.bus.publish(Placed(number=1))
        await shop.bus.publish(Told(number=1))
    assert session.in_transaction()
    if not shop.store.exclusive:
        await t.settled()
    assert [] == shop.seen
    await done(session.commit())
    await t.settled()
    assert [-1, 1] == sorted(shop.seen)
    await done(session.close())


@every_case
async def test_joined_session_is_rolled_back_by_its_owner(shop: Shop, t: Harness) -> None:
    """What was published in a session that its owner rolls back, or only closes, does not exist."""
    for end in ("rollback", "close"):
        session = shop.session()
        async with shop.bus.transaction(session):
            await place(session, 1)
            await shop.bus.publish(Placed(number=1))
            await shop.bus.publish(Told(number=1))
        await done(getattr(session, end)())
        await place(session, 2)
        await done(session.execute(delete(ORDERS)))
        await done(session.commit())
        await done(session.close())
    await t.settled()
    assert [] == shop.seen
    assert [] == await shop.numbers()


@every_case
async def test_error_in_a_joined_session_is_its_owners(shop: Shop, t: Harness) -> None:
    """An error in the block writes no event, and leaves to the owner what becomes of the session."""
    session = shop.session()
    await place(session, 1)
    with pytest.raises(ZeroDivisionError):
        async with shop.bus.transaction(session):
            await shop.bus.publish(Placed(number=1))
            raise ZeroDivisionError
    await place(session, 2)
    await done(session.commit())
    await done(session.close())
    await t.settled()
    assert [] == shop.seen
    assert [1, 2] == await shop.numbers()


@every_case
async def test_nested_transactions(shop: Shop, t: Harness) -> None:
    """A nested transaction is a savepoint: one that fails takes its rows and events, at any depth."""
    async with shop.bus.transaction() as tx:
        await shop.bus.publish(Placed(number=1))
        with pytest.raises(ZeroDivisionError):
            async with shop.bus.transaction() as inner:
                assert inner is tx
                await place(tx.session, 2)
                await shop.bus.publish(Placed(number=2))
                async with shop.bus.transaction():
                    await place(tx.session, 3)
                    await shop.bus.publish(Placed(number=3))
                raise ZeroDivisionError
        async with shop.bus.transaction():
            await place(tx.session, 4)
            await shop.bus.publish(Placed(number=4))
    await t.settled()
    assert [1, 4] == sorted(shop.seen)
    assert [4] == await shop.numbers()


@on_asyncio
async def test_savepoints_of_the_sessions_owner(shop: Shop, t: Harness) -> None:
    """A savepoint that the user makes on the session takes its events with it too, released inner ones included."""
    async with shop.bus.transaction() as tx:
        session = tx.session
        await place(session, 1)
        await shop.bus.publish(Placed(number=1))
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await shop.bus.publish(Placed(number=2))
                await shop.bus.publish(Told(number=2))
                async with session.begin_nested():
                    await shop.bus.publish(Placed(number=3))
                await place(session, 1)
        async with session.begin_nested():
            await shop.bus.publish(Placed(number=4))
            await shop.bus.publish(Told(number=4))
    await t.settled()
    assert [-4, 1, 4] == sorted(shop.seen)


@on_asyncio
async def test_owners_savepoint_around_the_block(shop: Shop, t: Harness) -> None:
    """A block inside the owner's savepoint is gone with it, and nothing leaves before the whole commit."""
    async with AsyncSession(shop.engine) as session, session.begin():
        point = await session.begin_nested()
        async with shop.bus.transaction(session):
            await shop.bus.publish(Placed(number=1))
            await shop.bus.publish(Told(number=1))
        await point.rollback()
        async with session.begin_nested(), shop.bus.transaction(session):
            await shop.bus.publish(Placed(number=2))
            await shop.bus.publish(Told(number=2))
        assert [] == shop.seen
    await t.settled()
    assert [-2, 2] == sorted(shop.seen)


@every_case
async def test_many_events_are_one_insert(shop: Shop, t: Harness) -> None:
    """What a transaction publishes is written in one INSERT."""
    inserts: list[str] = []
    engine = shop.engine.sync_engine if isinstance(shop.engine, AsyncEngine) else shop.engine

    @event.listens_for(engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        if "INSERT INTO eventbus_entry" in statement:
            inserts.append(statement)

    async with shop.bus.transaction() as tx:
        await place(tx.session, 1)
        for n in range(5):
            await shop.bus.publish(Placed(number=n))
        await shop.bus.publish_many([Placed(number=5), Placed(number=6)])
    assert 1 == len(inserts)
    await t.settled()
    assert list(range(7)) == sorted(shop.seen)


@every_case
async def test_session_of_another_engine_is_refused(shop: Shop, t: Harness, databases: Databases, kind: str) -> None:
    """A session of another engine, though on the same database, is refused; so is what is no session."""
    other = databases(kind).engine()
    session = AsyncSession(other) if isinstance(other, AsyncEngine) else Session(other)
    with pytest.raises(StoreError, match="another engine"):
        async with shop.bus.transaction(session):
            pass
    wrong = Session(shop.engine.sync_engine) if isinstance(other, AsyncEngine) else object()
    with pytest.raises(TypeError, match="joins a"):
        async with shop.bus.transaction(wrong):
            pass
    options = shop.engine.execution_options(logging_token="same")
    async with shop.bus.transaction(AsyncSession(options) if isinstance(other, AsyncEngine) else Session(options)):
        pass
    await dispose(other)


@every_case
async def test_transaction_that_is_over_refuses(shop: Shop, t: Harness) -> None:
    """A task that outlived its transaction can neither publish into it nor use its session."""
    over, told = anyio.Event(), anyio.Event()
    errors: list[Exception] = []

    async def late(tx: Tx) -> None:
        await over.wait()
        for attempt in (lambda: shop.bus.publish(Placed(number=1)), lambda: place(tx.session, 1)):
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


@on_asyncio
async def test_handlers_and_their_dependencies(engine: Any) -> None:
    """A handler and its dependencies share the session; effects, messages and "done" are one commit."""
    shop = Shop(engine)
    attempts: list[int] = []

    async def orders(tx: Transaction[AsyncSession]) -> Any:
        return lambda number: tx.session.execute(insert(ORDERS).values(number=number))

    @shop.module.handles(Place)
    async def on_place(cmd: Place, tx: Transaction[AsyncSession], bus: EventBus) -> int:
        await place(tx.session, cmd.number)
        await bus.publish(Placed(number=cmd.number))
        if cmd.number == 13:
            raise ValueError("unlucky")
        return cmd.number * 2

    @shop.module.on(Placed, retry=Retry(attempts=2, initial=0.1, jitter=False))
    async def on_placed(event: Placed, add: Annotated[Any, Depends(orders)], tx: Transaction[AsyncSession]) -> None:
        attempts.append(event.number)
        await add(100 * len(attempts))
        if len(attempts) == 1:
            raise RuntimeError

    async with harness(shop.bus) as t:
        assert 4 == await shop.bus.send(Place(number=2))
        with pytest.raises(ValueError, match="unlucky"):
            await shop.bus.send(Place(number=13))
        await t.advance(60)
        assert [2, 2] == attempts
        assert [2, 200] == await shop.numbers()
        assert len(t.failed("shop.on_placed")) == 1
        assert not t.dead


@pytest.mark.parametrize(("kind", "anyio_backend"), [case for case in CASES if case[0][:4] == "sync"])
async def test_sync_handlers(engine: Any) -> None:
    """A plain def handler in a thread works on a plain Session, on both backends."""
    shop = Shop(engine)

    @shop.module.on(Placed)
    def on_placed(event: Placed, tx: Transaction[Session]) -> None:
        tx.session.execute(insert(ORDERS).values(number=event.number))

    async with harness(shop.bus) as t:
        async with shop.bus.transaction():
            await shop.bus.publish(Placed(number=1))
        await t.settled()
        assert [1] == await shop.numbers()


@on_postgresql
async def test_wrong_session_type_is_a_fault(engine: Any) -> None:
    """A handler that asks for a session that the store does not make is a fault in the wiring."""
    shop = Shop(engine)

    @shop.module.on(Placed)
    async def on_placed(event: Placed, tx: Transaction[Session]) -> None: ...

    with pytest.raises(WiringError, match=r"Transaction\[Session\].*AsyncSession"):
        shop.bus.compile()


@on_asyncio
async def test_sqlmodel(engine: Any) -> None:
    """SQLModel's session is joined as it is, and given to handlers when the store is told how to make it."""
    maker = async_sessionmaker(engine, class_=SQLModelAsyncSession, expire_on_commit=False)
    shop = Shop(engine, sessionmaker=maker)

    @shop.module.on(Placed)
    async def on_placed(event: Placed, tx: Transaction[SQLModelAsyncSession]) -> None:
        found = await tx.session.exec(sqlmodel.select(ORDERS.c.number))
        shop.seen += [*found.all(), isinstance(tx.session, SQLModelAsyncSession)]

    async with harness(shop.bus) as t, SQLModelAsyncSession(engine) as session:
        await place(session, 1)
        async with shop.bus.transaction(session):
            await shop.bus.publish(Placed(number=1))
        await session.commit()
        await t.settled()
    assert [1, True] == shop.seen


@pytest.mark.parametrize(("kind", "anyio_backend"), [("sync psycopg", "asyncio")])
async def test_sync_sqlmodel(engine: Any) -> None:
    """So is SQLModel's plain session."""
    shop = Shop(engine, sessionmaker=sessionmaker(engine, class_=sqlmodel.Session))

    @shop.module.on(Placed)
    def on_placed(event: Placed, tx: Transaction[sqlmodel.Session]) -> None:
        shop.seen += tx.session.exec(sqlmodel.select(ORDERS.c.number)).all()

    async with harness(shop.bus) as t:
        with sqlmodel.Session(engine) as session:
            await place(session, 1)
            async with shop.bus.transaction(session):
                await shop.bus.publish(Placed(number=1))
            session.commit()
        await t.settled()
    assert [1] == shop.seen


@on_asyncio
async def test_requests(shop: Shop) -> None:
    """A request's transaction is committed before its response; an error in the endpoint takes everything back."""
    app = FastAPI()
    install(app, shop.bus)

    @app.post("/{number}")
    async def create(number: int, tx: TransactionDep[AsyncSession], bus: BusDep) -> int:
        await place(tx.session, number)
        await bus.publish(Placed(number=number))
        if number == 13:
            raise ZeroDivisionError
        return number

    async with harness(shop.bus, app=app) as t:
        assert 200 == (await t.client.post("/1")).status_code
        assert [1] == await shop.numbers()
        with pytest.raises(ZeroDivisionError):
            await t.client.post("/13")
        await t.settled()
        assert [1] == await shop.numbers()
    assert [1] == shop.seen


@on_postgresql
async def test_failing_commit_is_a_failing_request(shop: Shop) -> None:
    """When the COMMIT fails, the request fails, nothing leaves and no row is there."""
    app = FastAPI()
    install(app, shop.bus)
    async with shop.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS late (n INT UNIQUE DEFERRABLE INITIALLY DEFERRED)"))

    @app.post("/")
    async def create(tx: TransactionDep[AsyncSession], bus: BusDep) -> None:
        await tx.session.execute(text("INSERT INTO late VALUES (1), (1)"))
        await bus.publish(Placed(number=1))
        await bus.publish(Told(number=1))

    async with harness(shop.bus, app=app) as t:
        with pytest.raises(StoreError, match="the commit failed"):
            await t.client.post("/")
        await t.settled()
        assert [] == shop.seen
        async with shop.bus.transaction() as tx:
            assert 0 == await tx.session.scalar(text("SELECT COUNT(*) FROM late"))


@on_postgresql
async def test_error_of_a_commit_writes_nothing(engine: Any) -> None:
    """An error from the COMMIT of a handler leaves its entry to the lease: no failure is counted."""
    shop = Shop(engine)
    shop.bus = EventBus(
        shop.module, name="test", store=shop.store, routes={"t.placed": "store"}, limits=Limits(lease=9.0)
    )
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS late (n INT UNIQUE DEFERRABLE INITIALLY DEFERRED)"))

    @shop.module.on(Placed, retry=Retry(attempts=1))
    async def on_placed(event: Placed, tx: Transaction[AsyncSession]) -> None:
        shop.seen.append(event.number)
        if len(shop.seen) == 1:
            await tx.session.execute(text("INSERT INTO late VALUES (1), (1)"))

    async with harness(shop.bus) as t:
        async with shop.bus.transaction():
            await shop.bus.publish(Placed(number=1))
        await t.settled()
        assert [1] == shop.seen
        await t.advance(20)
        assert [1, 1] == shop.seen
        assert not t.dead


@on_postgresql
async def test_what_is_wrong_with_the_users_objects(shop: Shop, t: Harness) -> None:
    """An error in what the session writes at the commit, or at a savepoint, arrives as SQLAlchemy's own."""
    mapped = registry()

    class Order:
        def __init__(self, number: int) -> None:
            self.number = number

    mapped.map_imperatively(Order, ORDERS)
    with pytest.raises(IntegrityError):
        async with shop.bus.transaction() as tx:
            await place(tx.session, 1)
            await shop.bus.publish(Placed(number=1))
            tx.session.add(Order(1))
    async with shop.bus.transaction() as tx:
        await place(tx.session, 2)
        with pytest.raises(IntegrityError):
            async with shop.bus.transaction():
                tx.session.add(Order(2))
    mapped.dispose()
    await t.settled()
    assert [] == shop.seen
    assert [2] == await shop.numbers()


def test_names_of_the_tables() -> None:
    """The tables carry the bus's name, so that they stand beside the user's own."""
    assert {"eventbus_entry", "eventbus_subscription", "eventbus_schema"} == set(ours.tables)


@every_case
async def test_handler_whose_objects_cannot_be_written_has_failed(engine: Any) -> None:
    """What only the writing of its objects finds, after it has returned, counts as the handler's failure at once."""
    mapped, shop = registry(), Shop(engine)

    class Order:
        def __init__(self, number: int) -> None:
            self.number = number

    mapped.map_imperatively(Order, ORDERS)

    @shop.module.on(Placed, retry=Retry(attempts=2, initial=1.0, jitter=False))
    async def twice(event: Placed, tx: Tx) -> None:
        tx.session.add(Order(event.number))

    async with harness(shop.bus) as t:
        async with shop.bus.transaction() as tx:
            await place(tx.session, 1)
            await shop.bus.publish(Placed(number=1))
        await t.advance(2)
        (dead,) = t.dead
        assert dead.failures == 2
        assert "IntegrityError" in dead.error
        assert [1] == await shop.numbers()
    mapped.dispose()
