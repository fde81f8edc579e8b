"""Examine the SQLAlchemy store on every driver, with what is its own: engines, tables, drivers, wake-ups."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from eventbus.errors import StoreError, WrongLoopError
from eventbus.store import DeadFilter, Interest, NewEntry, Recipient, Settlement, Store, connect
from eventbus.stores import _sqlalchemy_schema as schema
from eventbus.stores.sqlalchemy import SQLAlchemyStore, ddl, metadata
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing.store_exam import CHECKS, LIMITS, Check, HandClock, examine
from tests.stores.databases import CASES, DRIVERS, ON_ASYNCIO, Database, Databases, a_database, dispose

H = Recipient("svc/plain")
NOTIFYING = ("psycopg", "asyncpg", "sync psycopg")

every_case = pytest.mark.parametrize(("kind", "anyio_backend"), CASES)
every_driver = pytest.mark.parametrize("kind", DRIVERS)


@pytest.fixture(scope="module")
def databases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """Return how a test gets the database of a kind, made when it is first asked for."""
    made: dict[str, Database] = {}
    with ExitStack() as stack:

        def of(kind: str) -> Database:
            if kind not in made:
                directory = tmp_path_factory.mktemp("sqlalchemy")
                made[kind] = stack.enter_context(a_database(kind, request, directory))
            return made[kind]

        yield of


@pytest.fixture
def database(kind: str, databases: Databases) -> Database:
    """Return the database of this test's kind, without tables."""
    database = databases(kind)
    database.wipe()
    return database


@pytest.fixture
async def engine(database: Database) -> AsyncIterator[Any]:
    """Return an engine of the user's."""
    engine = database.engine()
    yield engine
    await dispose(engine)


@pytest.fixture
async def store(engine: Any) -> AsyncIterator[SQLAlchemyStore]:
    """Return an open store with one handler announced."""
    async with SQLAlchemyStore(engine, create=True) as store:
        await store.announce([Interest(H.name, "t")])
        yield store


def new(*ids: str, key: str | None = None) -> list[NewEntry]:
    """Return messages to be written."""
    return [NewEntry(message_id=id_, type="t", body=b"{}", key=key) for id_ in ids]


async def ids(store: Store, limit: int = 100) -> list[str]:
    """Claim what is due and return the message ids."""
    return [one.message_id for one in (await store.claim(H, owner="w", limit=limit, lease=30.0)).entries]


def in_use(engine: Any) -> int:
    """Count the connections that the pool has lent."""
    return engine.pool.checkedout()


@every_case
@pytest.mark.parametrize("check", CHECKS, ids=str)
async def test_exam(check: Check, engine: Any) -> None:
    """The store passes the exam of every store on every driver, and gives every connection back."""
    await examine(check, lambda: SQLAlchemyStore(engine, create=True, limits=LIMITS))
    assert 0 == in_use(engine)


@pytest.mark.parametrize("anyio_backend", ["trio"])
@pytest.mark.parametrize("kind", ["aiosqlite"])
async def test_async_engine_on_trio_is_refused(database: Database) -> None:
    """An AsyncEngine on trio is an error that says to take a plain Engine."""
    with pytest.raises(StoreError, match=r"asyncio only.*create_engine"):
        await SQLAlchemyStore(create_async_engine(database.url), create=True).__aenter__()


@every_driver
@ON_ASYNCIO
async def test_missing_tables(engine: Any) -> None:
    """Without tables, and without being asked to make them, the store says what to run and makes nothing."""
    store = SQLAlchemyStore(engine)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"ddl\('(postgresql|mariadb|sqlite)'\).*metadata.*create=True"):
            await store.__aenter__()
    assert 0 == in_use(engine)


@every_driver
@ON_ASYNCIO
async def test_ddl_makes_the_tables(engine: AsyncEngine) -> None:
    """What ddl() prints makes tables that the store takes, the same as those of create=True."""
    async with engine.begin() as connection:
        for statement in ddl(engine.dialect.name).split(";\n"):
            if statement.strip():
                await connection.execute(text(statement))
    async with SQLAlchemyStore(engine) as store:
        await store.announce([Interest(H.name, "t")])
        await store.add(new("m"))
        assert ["m"] == await ids(store)


def test_ddl_of_nothing_known() -> None:
    """ddl() refuses a dialect that has no store."""
    with pytest.raises(ValueError, match=r"oracle.*known are"):
        ddl("oracle")


@every_driver
@ON_ASYNCIO
async def test_tables_of_a_migration(engine: AsyncEngine) -> None:
    """Tables that a migration made of ``metadata``, without a row in them, are taken as they are."""
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    for _ in range(2):
        async with SQLAlchemyStore(engine) as store:
            assert [] == await ids(store)


@pytest.mark.parametrize("kind", ["psycopg"])
@pytest.mark.parametrize(("oldest", "accepted"), [(1, True), (2, False)])
@ON_ASYNCIO
async def test_newer_tables(engine: AsyncEngine, oldest: int, accepted: bool) -> None:
    """Newer tables are used as long as they say that this version may."""
    async with SQLAlchemyStore(engine, create=True):
        pass
    async with engine.begin() as connection:
        await connection.execute(text(f"INSERT INTO eventbus_schema VALUES (2, {oldest})"))
    store = SQLAlchemyStore(engine)
    if accepted:
        async with store:
            assert [] == await ids(store)
        return
    with pytest.raises(StoreError, match=r"version 2.*too old"):
        await store.__aenter__()


@every_driver
@ON_ASYNCIO
async def test_many_make_the_tables_at_once(database: Database) -> None:
    """Processes that start at the same time on an empty database all come up."""
    engines = [database.engine() for _ in range(4)]
    stores = [SQLAlchemyStore(engine, create=True) for engine in engines]
    async with anyio.create_task_group() as group:
        for store in stores:
            group.start_soon(store.__aenter__)
    for store, engine in zip(stores, engines, strict=True):
        await store.__aexit__(None, None, None)
        await dispose(engine)
    assert [(1,)] == await anyio.to_thread.run_sync(database.run, "SELECT COUNT(*) FROM eventbus_schema")


@pytest.mark.parametrize(
    ("dialect", "banner", "fault"),
    [
        ("mysql", "8.4.3", "MySQL 8.4.3: this store needs MariaDB 10.6"),
        ("mariadb", "10.5.27-MariaDB", "needs MariaDB 10.6"),
        ("postgresql", "11.22", "needs PostgreSQL 12.0"),
        ("sqlite", "3.34.1", "needs SQLite 3.35"),
    ],
)
def test_servers_that_are_too_old(dialect: str, banner: str, fault: str) -> None:
    """A server that cannot do what the statements ask for is refused at the start, with the version that can."""
    server: Any = SimpleNamespace(dialect=SimpleNamespace(name=dialect), scalar=lambda statement: banner)
    with pytest.raises(StoreError, match=re.escape(fault)):
        schema.prepare(server, create=False, where="db")


def test_schemes(tmp_path: Path) -> None:
    """The URL chooses the store; sqlite:// without a driver stays the one of the standard library."""
    assert isinstance(connect(f"sqlite:///{tmp_path}/a.db"), SQLiteStore)
    for url in ("postgresql+psycopg://h/d", "postgresql://h/d", "mariadb://h/d", "sqlite+aiosqlite:///a.db"):
        store = connect(url)
        assert isinstance(store, SQLAlchemyStore)
        assert issubclass(store.sessions[0], AsyncSession)
    store = connect("sqlite+pysqlite:///a.db")
    assert issubclass(store.sessions[0], Session)
    with pytest.raises(ValueError, match=r"\?create= is true or false"):
        connect("postgresql://h/d?create=maybe")


@pytest.mark.parametrize(("kind", "anyio_backend"), [case for case in CASES if not case[0].startswith("sync")])
async def test_store_of_a_url(database: Database) -> None:
    """A store made of a URL creates its tables when asked to, and opens again."""
    store = connect(f"{database.url}?create=true")
    for id_ in ("a", "b"):
        async with store:
            await store.announce([Interest(H.name, "t")])
            await store.add(new(id_))
    async with connect(database.url) as store:
        assert ["a", "b"] == await ids(store)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@ON_ASYNCIO
async def test_no_password_is_shown(driver: str) -> None:
    """An error about the connection names the database and hides the password."""
    store = connect(f"postgresql+{driver}://bob:s3cret@127.0.0.1:9/shop")
    with pytest.raises(StoreError, match=r"bob:\*\*\*@127\.0\.0\.1:9/shop") as caught:
        await store.__aenter__()
    assert "s3cret" not in str(caught.value)


@every_case
async def test_times_are_the_databases(store: SQLAlchemyStore) -> None:
    """Without a bound clock leases and delays are counted by the database's own."""
    await store.add([NewEntry(message_id="later", type="t", body=b"", delay=60.0), *new("now")])
    assert ["now"] == await ids(store)
    wait = (await store.due([H.name]))[H.name]
    assert 20.0 < wait <= 30.0
    (backlog,) = await store.backlog()
    assert (2, True) == (backlog.waiting, backlog.announced)


@every_case
async def test_not_open(engine: Any) -> None:
    """A store that is not open, or not any more, says so."""
    store = SQLAlchemyStore(engine, create=True)
    with pytest.raises(StoreError, match="not open"):
        await store.add(new("m"))
    async with store:
        with pytest.raises(StoreError, match="open already"):
            await store.__aenter__()
    with pytest.raises(StoreError, match="not open"):
        store.begin()


@pytest.mark.parametrize("kind", ["aiosqlite"])
@ON_ASYNCIO
async def test_another_loop_is_refused(store: SQLAlchemyStore) -> None:
    """An AsyncEngine's store belongs to the event loop that it was opened in."""

    def elsewhere() -> None:
        anyio.run(store.add, new("m"))

    with pytest.raises(WrongLoopError):
        await anyio.to_thread.run_sync(elsewhere)


# wake-ups


async def woken(store: Store, do: Any) -> None:
    """Expect ``do`` to wake who listens."""
    news, listens = anyio.Event(), anyio.Event()

    def wake() -> None:
        (news if listens.is_set() else listens).set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(store.listen, wake)
            await listens.wait()
            await do()
            await news.wait()
            group.cancel_scope.cancel()


@pytest.mark.parametrize(("kind", "anyio_backend"), [case for case in CASES if case[0] in NOTIFYING])
async def test_commit_wakes_who_listens(store: SQLAlchemyStore, database: Database) -> None:
    """A commit of another process wakes who listens on PostgreSQL, without a poll."""

    async def publish() -> None:
        async with store.begin() as unit:
            await unit.add(new("m"))

    await woken(store, publish)


@pytest.mark.parametrize(("kind", "anyio_backend"), [case for case in CASES if case[0] in NOTIFYING])
async def test_lost_connection_is_made_again(store: SQLAlchemyStore, database: Database) -> None:
    """When the listening connection is cut, the next one wakes at once, for what came in between."""
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND pid <> pg_backend_pid()"
    )

    async def cut() -> None:
        await anyio.to_thread.run_sync(database.run, kill)

    await woken(store, cut)


@pytest.mark.parametrize("kind", ["psycopg"])
@ON_ASYNCIO
async def test_one_notification_for_a_transaction(store: SQLAlchemyStore, database: Database) -> None:
    """A transaction notifies once, however much is published in it, and not at all when nobody wants it."""
    engine = database.engine(isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        await driver.execute("LISTEN eventbus")
        async with store.begin() as unit:
            for n in range(10):
                await unit.add(new(f"a{n}", f"b{n}"))
        await store.add([NewEntry(message_id="m", type="unwanted", body=b"")])
        heard = [one async for one in driver.notifies(timeout=1.0)]
    await engine.dispose()
    assert 1 == len(heard)


@pytest.mark.parametrize("kind", ["psycopg", "asyncmy", "aiosqlite"])
@ON_ASYNCIO
async def test_poll_finds_what_others_wrote(engine: Any, database: Database) -> None:
    """Without notifications the store looks by itself whether another process has written."""
    async with SQLAlchemyStore(engine, create=True, listen=False) as store:
        await store.announce([Interest(H.name, "t")])
        await store.add(new("first"))

        async def publish() -> None:
            await store.add(new("second"))

        await woken(store, publish)


# cancellation and trouble


@every_case
async def test_cancelled_callers_leave_nothing_behind(store: SQLAlchemyStore, engine: Any) -> None:
    """Who is cancelled at any checkpoint leaves a whole verb or none, and a pool that is clean."""
    written = 0
    for steps in range(12):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def publish(steps: int = steps) -> None:
                    await store.add(new(*(f"{steps}-{n}" for n in range(5))))

                async def transact(steps: int = steps) -> None:
                    async with store.begin() as unit:
                        await unit.add(new(*(f"t{steps}-{n}" for n in range(5))))

                group.start_soon(publish)
                group.start_soon(transact)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()
    await store.__aexit__(None, None, None)
    assert 0 == in_use(engine)
    async with store:
        found = await ids(store, 1_000)
        for steps in range(12):
            for prefix in (f"{steps}-", f"t{steps}-"):
                count = sum(one.startswith(prefix) for one in found)
                assert count in (0, 5), prefix
                written += count
    assert written == len(found)


@every_case
async def test_cancelled_claim_is_given_back(store: SQLAlchemyStore) -> None:
    """What a cancelled claim has leased is due again at once."""
    await store.add(new("m"))
    got: list[Settlement] = []

    async def claim() -> None:
        claimed = await store.claim(H, owner="w", limit=100, lease=30.0)
        got.extend(Settlement(one.seq, one.claims, "release") for one in claimed.entries)

    for steps in range(6):
        async with anyio.create_task_group() as group:
            group.start_soon(claim)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        await store.settle(got)  # a claim that was over before it was cancelled keeps what it got
        got.clear()
    with anyio.fail_after(10):
        while not (entries := (await store.claim(H, owner="w", limit=1, lease=30.0)).entries):
            await anyio.lowlevel.checkpoint()
    assert 0 == entries[0].crashes


@pytest.mark.parametrize("kind", ["psycopg", "asyncpg", "asyncmy"])
@ON_ASYNCIO
async def test_deadlock_is_tried_again(store: SQLAlchemyStore) -> None:
    """A verb that the database broke off to solve a deadlock is repeated, and nobody notices."""
    second = anyio.Event()

    async def crossing() -> None:
        await store.add(new("y", "x"))
        second.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group, store.begin() as unit:
            await unit.session.connection()  # else it would be written at the end
            await unit.add(new("w1", "w2", "w3", "x"))
            group.start_soon(crossing)
            await anyio.sleep(0.3)
            assert not second.is_set()
            await unit.add(new("y"))
    assert sorted(["w1", "w2", "w3", "x", "y"]) == sorted(await ids(store))


DEADLOCK = {
    "asyncmy": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'Deadlock found'",
    "psycopg": "DO $$ BEGIN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END $$",
}
DEADLOCK["sync psycopg"] = DEADLOCK["psycopg"]


@pytest.mark.parametrize("kind", DEADLOCK)
@ON_ASYNCIO
async def test_deadlocks_in_a_row_are_tried_again(
    kind: str, store: SQLAlchemyStore, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publisher outside a transaction of a user's own outlives many deadlocks in a row, one more is an error."""
    add, met = type(store._rows).add, 0

    def unlucky(rows: Any, connection: Any, entries: Any) -> frozenset[str]:
        nonlocal met
        met -= 1
        if met >= 0:
            connection.exec_driver_sql(DEADLOCK[kind])
        return add(rows, connection, entries)

    monkeypatch.setattr(type(store._rows), "add", unlucky)
    async with SQLAlchemyStore(engine) as other:
        met = 7
        await other.add(new("alone"))
        met = 7
        async with other.begin() as unit:
            await unit.add(new("of a unit"))
        met = 8
        with pytest.raises(StoreError, match=r"(?i)deadlock"):
            await other.add(new("unlucky"))
    assert ["alone", "of a unit"] == await ids(store)


@pytest.mark.parametrize("kind", ["asyncmy", "psycopg", "asyncpg"])
@ON_ASYNCIO
@pytest.mark.parametrize("caught", [False, True])
async def test_deadlock_in_a_transaction_of_the_users_is_theirs(
    store: SQLAlchemyStore, database: Database, caught: bool
) -> None:
    """Of two transactions that wait for each other one gets the database's own error, and nothing of it stays."""
    database.run("DROP TABLE IF EXISTS mine", "CREATE TABLE mine (id VARCHAR(9) PRIMARY KEY)")
    failed: dict[str, str] = {}
    written, both = 0, anyio.Event()

    async def publish(mine: str, other: str) -> None:
        nonlocal written
        try:
            async with store.begin() as unit:
                await unit.session.execute(text(f"INSERT INTO mine VALUES ('{mine}')"))
                await unit.add(new(mine))
                written += 1
                if written == 2:
                    both.set()
                await both.wait()
                try:
                    await unit.add(new(other))
                except DBAPIError:
                    if not caught:
                        raise
                    with contextlib.suppress(DBAPIError):  # PostgreSQL goes on only after a rollback
                        await unit.session.execute(text(f"INSERT INTO mine VALUES ('{mine}2')"))
        except DBAPIError as error:
            failed[mine] = str(error).lower()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(publish, "a", "b")
            group.start_soon(publish, "b", "a")
    assert ["deadlock" in error for error in failed.values()] == [True]
    assert {"a", "b"} - {*failed} == {row[0] for row in database.run("SELECT id FROM mine")}
    assert ["a", "b"] == sorted(await ids(store))


@pytest.mark.parametrize("kind", ["aiosqlite"])
@ON_ASYNCIO
async def test_connection_whose_closing_is_cancelled_leaves_no_task(store: SQLAlchemyStore, engine: Any) -> None:
    """Whenever SQLAlchemy is cancelled while it closes what a cancelled statement spoilt, nothing waits for ever."""
    before = asyncio.all_tasks()
    for turns in range(1, 7):
        connection = await engine.connect()
        spoilt: Any = (await connection.get_raw_connection()).dbapi_connection
        await connection.run_sync(Connection.detach)
        closing = asyncio.create_task(greenlet_spawn(spoilt.terminate))
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait(asyncio.all_tasks() - before, timeout=2)
        assert set() == asyncio.all_tasks() - before
    await store.add(new("m"))
    assert ["m"] == await ids(store)


# SQLAlchemy leaves a dead connection of asyncmy to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["psycopg", "asyncpg", "asyncmy"])
@ON_ASYNCIO
async def test_dead_connections_of_the_pool(store: SQLAlchemyStore, engine: Any, kind: str, database: Database) -> None:
    """Connections that the server has cut while they lay in the pool trouble nobody but a claim."""
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
    kills = [kill + "AND pid <> pg_backend_pid()"]
    if kind == "asyncmy":
        others = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"
        kills = [f"KILL {id}" for (id,) in await anyio.to_thread.run_sync(database.run, others)]
    assert kills
    await anyio.to_thread.run_sync(database.run, *kills)
    await store.backlog()
    await store.add(new("m"))
    assert ["m"] == await ids(store)


@pytest.mark.parametrize("kind", ["psycopg", "asyncpg", "asyncmy"])
@ON_ASYNCIO
async def test_own_transactions_are_read_committed(database: Database) -> None:
    """A transaction of the store's own sees what others commit meanwhile, whatever the engine's level is."""
    engine = database.engine(isolation_level="REPEATABLE READ")
    async with SQLAlchemyStore(engine, create=True) as store:
        await store.announce([Interest(H.name, "t")])
        async with store.begin() as unit:
            count = text("SELECT COUNT(*) FROM eventbus_entry")
            assert 0 == await unit.session.scalar(count)
            await store.add(new("m"))
            assert 1 == await unit.session.scalar(count)
            async with unit.savepoint():
                await unit.add(new("n"))
    await engine.dispose()


@pytest.mark.parametrize("kind", ["psycopg", "asyncpg", "asyncmy"])
@ON_ASYNCIO
async def test_publishers_do_not_wait_for_each_other(store: SQLAlchemyStore) -> None:
    """A redelivery that waits for an uncommitted row with its id stops no publisher of other ids."""
    again = anyio.Event()

    async def redeliver() -> None:
        await store.add(new("same"))
        again.set()

    async with anyio.create_task_group() as group, store.begin() as unit:
        await unit.session.connection()  # else it would be written at the end
        await unit.add(new("same"))
        group.start_soon(redeliver)
        await anyio.sleep(0.2)
        with anyio.fail_after(5):
            await store.add(new("sane"))  # behind it: ids grow, and the gap before a row is locked with it
        assert not again.is_set()
    assert ["same", "sane"] == sorted(await ids(store))


@every_driver
@ON_ASYNCIO
async def test_row_lock_keeps_a_claim(engine: Any) -> None:
    """A handler's transaction keeps its entry though the lease lapses: nobody else claims it, and done is done."""
    store, clock = SQLAlchemyStore(engine, create=True), HandClock()
    if store.exclusive:
        return
    store.bind(clock)
    async with store:
        await store.announce([Interest(H.name, "t"), Interest("svc/ordered", "t", ordered=True)])
        await store.add(new("m", key="k"))
        for recipient in (H, Recipient("svc/ordered", ordered=True)):
            (entry,) = (await store.claim(recipient, owner="w", limit=1, lease=30.0)).entries
            async with store.begin() as unit:
                assert await unit.lock(entry.seq, entry.claims)
                clock.advance(100.0)
                with anyio.fail_after(5):
                    assert [] == list((await store.claim(recipient, owner="thief", limit=1, lease=30.0)).entries)
                assert await unit.settle(Settlement(entry.seq, entry.claims, "done"))
            assert [] == list((await store.claim(recipient, owner="w", limit=1, lease=30.0)).entries)


@every_driver
@ON_ASYNCIO
async def test_sweep_waits_for_nobody(store: SQLAlchemyStore) -> None:
    """A sweep goes round the row of a handler that runs in its transaction."""
    if store.exclusive:
        return
    await store.add(new("m"))
    (entry,) = (await store.claim(H, owner="w", limit=1, lease=30_000.0)).entries
    async with store.begin() as unit:
        assert await unit.lock(entry.seq, entry.claims)
        with anyio.fail_after(5):
            assert 0 == await store.sweep(retention=0.0, lease=1.0, batch=10)
    assert 1 == await store.sweep(retention=0.0, lease=1.0, batch=10)


@pytest.mark.parametrize("kind", ["aiosqlite"])
@ON_ASYNCIO
async def test_sqlite_begins_for_real(store: SQLAlchemyStore, engine: AsyncEngine) -> None:
    """A savepoint as the first statement goes with the rollback, which SQLite's driver alone would not see to."""
    async with AsyncSession(engine) as session:
        async with store.begin(session) as unit, unit.savepoint():
            await unit.add(new("gone"))
        await session.rollback()
    assert [] == await ids(store)


@every_case
async def test_odd_texts(store: SQLAlchemyStore) -> None:
    """An error text that no database could keep is kept so that it can be read."""
    await store.add(new("m"))
    (entry,) = (await store.claim(H, owner="w", limit=1, lease=30.0)).entries
    await store.settle([Settlement(entry.seq, entry.claims, "dead", error="a\x00b \ud800 🎈 %s :name")])
    (dead,) = await store.dead(DeadFilter())
    assert "a\\x00b \\ud800 🎈 %s :name" == dead.error


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_sync_sqlite(tmp_path: Path) -> None:
    """A plain engine on SQLite works too, on both backends."""
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    async with SQLAlchemyStore(engine, create=True) as store:
        await store.announce([Interest(H.name, "t")])
        async with store.begin() as unit:
            await unit.add(new("m"))
        assert ["m"] == await ids(store)
    engine.dispose()
