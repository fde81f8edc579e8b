"""Add from many tasks at once: together where that is possible, and alone where one has spoiled the others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint
from sqlalchemy import event, text
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from eventbus.errors import StoreError
from eventbus.store import Interest, NewEntry, Recipient
from eventbus.stores._sqlalchemy_gathering import ENTRIES, FLIGHTS, Gathering
from eventbus.stores.sqlalchemy import SQLAlchemyStore
from tests.stores.databases import ON_ASYNCIO, Databases, a_database, dispose

H = Recipient("svc/plain")
Over = Callable[[Any, BaseException | None], object]


def new(id_: str, body: bytes = b"{}") -> NewEntry:
    """Return a message to be written."""
    return NewEntry(message_id=id_, type="t", body=body)


class Launches:
    """Be a link whose statements end when a test says so."""

    def __init__(self) -> None:
        self.flying: list[tuple[list[str], Over]] = []
        self.gathering = Gathering(self, self.add)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def launch(self, work: Callable[[Any], Any], over: Over) -> None:
        """Take a statement."""
        self.flying.append((work(None), over))

    def add(self, _: object, entries: Sequence[NewEntry]) -> Any:
        """Return what a statement has in it."""
        return [entry.message_id for entry in entries]

    async def begin(self, group: TaskGroup, add: Callable[..., Any], *things: Any) -> None:
        """Have each thing added by a task of its own, one after another."""
        for thing in things:
            before = len(self.flying) + len(self.gathering._waiting)
            group.start_soon(add, thing)
            while len(self.flying) + len(self.gathering._waiting) == before:
                await checkpoint()

    async def add_ids(self, ids: Sequence[str]) -> None:
        """Add messages of these ids."""
        await self.gathering.add([new(id_) for id_ in ids])

    def land(self, error: BaseException | None = None) -> list[str]:
        """End the first statement, and return what it had in it."""
        ids, over = self.flying.pop(0)
        over(frozenset({H.name}) if error is None else None, error)
        return ids


def refused(kind: type[Exception] = DataError) -> StoreError:
    """Return what the store raises when the database has something against a statement."""
    error = StoreError("no")
    error.__cause__ = kind("INSERT", {}, Exception("no"))  # type: ignore[call-arg]
    return error


async def test_what_comes_meanwhile_goes_together() -> None:
    """What is added while as many statements as may be are on their way goes with one further statement."""
    link = Launches()
    async with anyio.create_task_group() as group:
        await link.begin(group, link.add_ids, *"01234")
        assert [["0"], ["1"]] == [link.land() for _ in range(FLIGHTS)]
        assert ["2", "3", "4"] == link.land()
        assert not link.flying


async def test_a_statement_has_a_ceiling() -> None:
    """No more than the ceilings of rows and bytes go with one statement, unless one addition is more by itself."""
    link = Launches()
    many = [new(f"many {number}") for number in range(ENTRIES)]
    async with anyio.create_task_group() as group:
        large = [new("3", b"x" * 2_000_000)]
        await link.begin(group, link.gathering.add, [new("0")], [new("1")], many, [new("2")], large, [new("4")])
        assert [["0"], ["1"]] == [link.land() for _ in range(FLIGHTS)]
        assert [ENTRIES, 1, 1, 1] == [len(link.land()) for _ in range(4)]


async def test_one_that_is_refused_spoils_no_other() -> None:
    """When the database refuses a statement of many, each is written alone, and only the bad one fails."""
    link, outcomes = Launches(), dict[str, object]()

    async def add(id_: str) -> None:
        try:
            outcomes[id_] = await link.gathering.add([new(id_)])
        except StoreError as error:
            outcomes[id_] = error

    async with anyio.create_task_group() as group:
        await link.begin(group, add, "a", "b", "good", "bad", "also good")
        link.land()
        link.land()
        together = link.land(refused())
        assert {"good", "bad", "also good"} == set(together)
        while link.flying:
            ((id_,), _), *_ = link.flying
            link.land(refused() if id_ == "bad" else None)
    assert isinstance(outcomes.pop("bad"), StoreError)
    assert {frozenset({H.name})} == set(outcomes.values())
    assert 4 == len(outcomes)


async def test_a_lost_link_fails_all_at_once() -> None:
    """When the link is lost nobody tries again one by one: that would take as many time-outs."""
    link, failed = Launches(), list[str]()

    async def add(id_: str) -> None:
        try:
            await link.gathering.add([new(id_)])
        except StoreError:
            failed.append(id_)

    async with anyio.create_task_group() as group:
        await link.begin(group, add, *"0123")
        assert [["0"], ["1"], ["2", "3"]] == [link.land(refused(OperationalError)) for _ in range(3)]
    assert 4 == len(failed)


async def test_a_cancelled_one_that_waits_is_not_written() -> None:
    """Who is cancelled before the statement is on its way has written nothing; the others go on."""
    link = Launches()
    async with anyio.create_task_group() as group:
        await link.begin(group, link.add_ids, *"01")
        with anyio.move_on_after(0.01):
            await link.gathering.add([new("cancelled")])
        assert [["0"], ["1"]] == [link.land() for _ in range(FLIGHTS)]
        assert not link.flying


async def test_statements_that_hang_keep_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes when nothing has come back for a while does not wait for it: that may wait for somebody's lock."""
    link = Launches()
    async with anyio.create_task_group() as group:
        await link.begin(group, link.add_ids, *"01")
        monkeypatch.setattr("eventbus.stores._sqlalchemy_gathering.SLOW", 0.0)
        await link.begin(group, link.add_ids, "2")
        assert 3 == len(link.flying)
        assert [["0"], ["1"], ["2"]] == [link.land() for _ in range(3)]


# on a real database


@pytest.fixture(scope="module")
def databases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    """Return how a test gets the database of a kind."""
    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(a_database(kind, request, tmp_path_factory.mktemp("gathering")))


@pytest.fixture
async def engine(databases: Databases) -> Any:
    """Return an engine on an empty PostgreSQL database."""
    engine = databases("psycopg").engine()
    yield engine
    await dispose(engine)


async def claimed(store: SQLAlchemyStore) -> list[str]:
    """Claim what is due and return the message ids, in the order of their writing."""
    return [one.message_id for one in (await store.claim(H, owner="w", limit=100, lease=30.0)).entries]


@ON_ASYNCIO
async def test_a_transaction_that_only_publishes_is_one_statement(engine: Any) -> None:
    """A transaction whose session nobody asked for begins none: its entries are written by one statement."""
    said: list[str] = []

    def sessions() -> AsyncSession:
        raise AssertionError("a session was made")

    sessions.class_ = AsyncSession  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]
    async with SQLAlchemyStore(engine, create=True, sessionmaker=sessions) as store:  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await store.announce([Interest(H.name, "t")])
        async with store.begin() as unit:
            await unit.add([new("warm")])
        event.listen(engine.sync_engine, "before_cursor_execute", lambda *told: said.append(told[2]))
        async with store.begin() as unit:
            assert {H.name} == await unit.add([new("a")])
            assert {H.name} == await unit.add([new("b")])
        (only,) = said
        assert "INSERT INTO eventbus_entry" in only
        with pytest.raises(ValueError, match="never"):
            async with store.begin() as unit:
                await unit.add([new("c")])
                raise ValueError("never")
        assert ["warm", "a", "b"] == await claimed(store)


@ON_ASYNCIO
async def test_what_was_published_before_the_session_began_comes_first(engine: Any) -> None:
    """It is written before all else, so that no savepoint of the session's user takes it along."""
    async with SQLAlchemyStore(engine, create=True) as store:
        await store.announce([Interest(H.name, "t")])
        async with store.begin() as unit:
            await unit.add([new("first")])
            point = await unit.session.begin_nested()
            await unit.add([new("undone")])
            await point.rollback()
            await unit.add([new("last")])
        assert ["first", "last"] == await claimed(store)
        async with store.begin() as unit:
            await unit.add([new("alone")])
            assert isinstance(unit.session, AsyncSession)
        assert ["alone"] == await claimed(store)
        with pytest.raises(ValueError, match="never"):
            async with store.begin() as unit:
                await unit.add([new("never")])
                await unit.session.execute(text("SELECT 1"))
                raise ValueError("never")
        assert [] == await claimed(store)


@ON_ASYNCIO
async def test_many_at_once_and_one_that_no_database_takes(engine: Any) -> None:
    """Of many that publish at once all are written but the one that PostgreSQL cannot keep."""
    failed: list[str] = []
    async with SQLAlchemyStore(engine, create=True) as store:
        await store.announce([Interest(H.name, "t")])

        async def publish(id_: str) -> None:
            try:
                async with store.begin() as unit:
                    await unit.add([new(id_)])
            except StoreError:
                failed.append(id_)

        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(publish, "nul\0" if number == 20 else f"{number:02}")
        assert ["nul\0"] == failed
        assert {f"{number:02}" for number in range(40) if number != 20} == set(await claimed(store))
