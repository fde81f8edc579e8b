"""Prove that the SQLite store keeps what every store promises, and what only it promises."""
# ruff: noqa: ASYNC240 - these tests look at the store's file while it runs

import os
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from eventbus.errors import StoreError, TransactionClosedError
from eventbus.store import DeadFilter, Interest, NewEntry, Recipient, Settlement, connect
from eventbus.stores.sqlite import SQLiteSession, SQLiteStore
from eventbus.testing.store_exam import CHECKS, LIMITS, Check, examine

H = Recipient("svc/h")


def new(id: str, *, key: str | None = None) -> NewEntry:
    """Return a message for the handler."""
    return NewEntry(message_id=id, type="t", body=b"body", key=key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the file is."""
    return tmp_path / "store.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SQLiteStore]:
    """Return an open store with one announced handler."""
    async with SQLiteStore(path) as store:
        await store.announce([Interest(H.name, "t")])
        yield store


async def writer(store: SQLiteStore, verb: Any) -> Any:
    """Do something on the writer's own connection."""
    return await store._write(lambda rows, now: verb(rows.connection))


async def statements(store: SQLiteStore) -> list[str]:
    """Return a list that gets every statement that the writer runs from now on."""
    log: list[str] = []
    await writer(store, lambda connection: connection.set_trace_callback(log.append))
    log.clear()
    return log


async def claimed(store: SQLiteStore) -> list[str]:
    """Claim everything due."""
    return [one.message_id for one in (await store.claim(H, owner="w", limit=1_000, lease=30.0)).entries]


@pytest.mark.parametrize("check", CHECKS, ids=str)
async def test_exam(check: Check, path: Path) -> None:
    """It passes the exam of every store."""
    await examine(check, lambda: SQLiteStore(path, limits=LIMITS))


async def settle_ticks() -> None:
    """Let every task run until it waits."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("how", ["add", "transaction"])
async def test_what_waits_is_committed_together(store: SQLiteStore, how: str) -> None:
    """Sixty-four tasks that each write a small transaction share one commit."""
    log = await statements(store)

    async def publish(id: str) -> None:
        if how == "add":
            await store.add([new(id)])
        else:
            async with store.begin() as unit:
                await unit.add([new(id)])

    async with anyio.create_task_group() as group, store.begin() as unit:
        await unit.session.execute("CREATE TABLE held (x)")
        for n in range(64):
            group.start_soon(publish, f"m{n}")
        await settle_ticks()
    assert len(await claimed(store)) == 64
    assert 2 <= sum(1 for one in log if one.startswith("COMMIT")) <= 4
    assert sum(1 for one in log if one.startswith("INSERT INTO eventbus_entry")) == 64


async def test_a_transaction_that_only_reads_its_session_takes_nothing(store: SQLiteStore) -> None:
    """Looking at the session does not begin anything: two open transactions do not meet."""
    log = await statements(store)
    async with store.begin() as one, store.begin() as two:
        assert isinstance(one.session, SQLiteSession)
        assert two.session is two.session
        await store.add([new("m")])
    assert sum(1 for sql in log if sql.startswith("BEGIN")) == 1


async def test_one_bad_verb_does_not_take_its_neighbours(store: SQLiteStore) -> None:
    """A verb that fails leaves those that waited with it committed, and gets its own error."""
    failed: list[str] = []

    async def publish(id: str) -> None:
        try:
            await store.add([new(f"first {id}"), new(id)])
        except ValueError:
            failed.append(id)

    async with anyio.create_task_group() as group, store.begin() as unit:
        await unit.session.execute("CREATE TABLE held (x)")
        for id_ in ("a", "b", "\ud800", "c"):
            group.start_soon(publish, id_)
        await settle_ticks()
    assert ["\ud800"] == failed
    assert ["a", "b", "c", "first a", "first b", "first c"] == sorted(await claimed(store))


async def test_others_wait_while_a_transaction_holds_the_writer(store: SQLiteStore) -> None:
    """Verbs queue behind an open transaction, in their order, and readers do not; nobody sees what is uncommitted."""
    order: list[str] = []

    async def publish(id: str) -> None:
        await store.add([new(id)])
        order.append(id)

    async with anyio.create_task_group() as group, store.begin() as unit:
        await unit.session.execute("INSERT INTO eventbus_subscription VALUES ('svc/seen', 'x', 0, 0)")
        group.start_soon(publish, "a")
        await settle_ticks()
        group.start_soon(publish, "b")
        await settle_ticks()
        assert "svc/seen" not in {one.recipient for one in await store.backlog()}
        assert [] == order
        order.append("held")
    assert "held" == order[0]
    assert ["a", "b"] == await claimed(store)
    assert "svc/seen" in {one.recipient for one in await store.backlog()}


async def test_session_does_what_it_says(store: SQLiteStore) -> None:
    """The session executes, counts, fetches, and commits with its transaction."""
    async with store.begin() as unit:
        session = unit.session
        assert await session.execute("CREATE TABLE stock (sku TEXT PRIMARY KEY, n INTEGER)") == -1
        assert await session.execute("INSERT INTO stock VALUES (?, ?)", ("bolt", 7)) == 1
        assert await session.execute("INSERT INTO stock VALUES (:sku, :n)", {"sku": "nut", "n": 9}) == 1
        assert await session.executemany("INSERT INTO stock VALUES (?, ?)", ((f"s{n}", n) for n in range(3))) == 3
        assert await session.execute("UPDATE stock SET n = n + 1") == 5
        assert await session.fetchone("SELECT n FROM stock WHERE sku = ?", ("bolt",)) == (8,)
        assert await session.fetchone("SELECT n FROM stock WHERE sku = 'none'") is None
        assert await session.fetchall("DELETE FROM stock WHERE n < 4 RETURNING sku") == [("s0",), ("s1",), ("s2",)]
        await unit.add([new("m")])
    async with store.begin() as unit:
        assert await unit.session.fetchall("SELECT sku, n FROM stock ORDER BY sku") == [("bolt", 8), ("nut", 10)]
    assert ["m"] == await claimed(store)


async def test_session_rolls_back_with_its_transaction_and_savepoint(store: SQLiteStore) -> None:
    """Rows and messages share the fate of their savepoint and transaction."""
    async with store.begin() as unit:
        await unit.session.execute("CREATE TABLE stock (n)")
    with pytest.raises(ZeroDivisionError):
        async with store.begin() as unit:
            await unit.session.execute("INSERT INTO stock VALUES (1)")
            await unit.add([new("gone")])
            raise ZeroDivisionError
    async with store.begin() as unit:
        await unit.add([new("a")])
        async with unit.savepoint():
            await unit.session.execute("INSERT INTO stock VALUES (2)")
            await unit.add([new("b")])
        with pytest.raises(ZeroDivisionError):
            async with unit.savepoint():
                await unit.add([new("gone, before")])
                await unit.session.execute("INSERT INTO stock VALUES (3)")
                async with unit.savepoint():
                    await unit.session.execute("INSERT INTO stock VALUES (4)")
                await unit.add([new("gone, after")])
                raise ZeroDivisionError
        await unit.session.execute("INSERT INTO stock VALUES (5)")
    async with store.begin() as unit:
        assert [(2,), (5,)] == await unit.session.fetchall("SELECT n FROM stock ORDER BY n")
    assert ["a", "b"] == await claimed(store)


async def test_an_error_in_a_statement_is_the_users_own(store: SQLiteStore) -> None:
    """What SQLite has against a statement arrives unchanged, and the transaction goes on."""
    async with store.begin() as unit:
        await unit.session.execute("CREATE TABLE stock (n PRIMARY KEY)")
        await unit.session.execute("INSERT INTO stock VALUES (1)")
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            await unit.session.execute("INSERT INTO stock VALUES (1)")
        with pytest.raises(sqlite3.OperationalError, match="syntax"):
            await unit.session.execute("INSERT OF stock")
        with pytest.raises(sqlite3.ProgrammingError):
            await unit.session.execute("SELECT 1; COMMIT")
        with pytest.raises(sqlite3.ProgrammingError):
            await unit.session.execute("SELECT ?", ())
        await unit.add([new("m")])
    assert ["m"] == await claimed(store)


@pytest.mark.parametrize(
    "sql",
    ["COMMIT", "commit", " \n\tRollback", "END", "BEGIN IMMEDIATE", "SAVEPOINT a", "RELEASE a", "; COMMIT",
     "ATTACH 'x' AS y", "DETACH y", "VACUUM", "PRAGMA journal_mode = DELETE", "-- why\nCOMMIT", "/* a */ -- b\n/**/end",
     "\ufeffCOMMIT"],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["execute", "executemany", "fetchall", "fetchone"])
async def test_session_leaves_the_transaction_alone(store: SQLiteStore, sql: str, verb: str) -> None:
    """Statements that would end the transaction, or leave the file, are refused before they run."""
    async with store.begin() as unit:
        await unit.session.execute("CREATE TABLE stock (n)")
        with pytest.raises(ValueError, match="is not for a session"):
            await getattr(unit.session, verb)(sql, *([[()]] if verb == "executemany" else []))
        await unit.session.execute("INSERT INTO stock VALUES (1)")
    async with store.begin() as unit:
        assert [(1,)] == await unit.session.fetchall("SELECT n FROM stock")


async def test_a_rollback_by_the_database_is_not_overlooked(store: SQLiteStore) -> None:
    """After a statement that rolled everything back nothing runs on, not even by itself, and nothing is committed."""
    async with store.begin() as unit:
        await unit.session.execute("CREATE TABLE stock (n PRIMARY KEY)")
    with pytest.raises(StoreError, match="rolled this transaction back"):
        async with store.begin() as unit:
            await unit.session.execute("INSERT INTO stock VALUES (1)")
            with pytest.raises(sqlite3.IntegrityError):
                await unit.session.execute("INSERT OR ROLLBACK INTO stock VALUES (1)")
            with pytest.raises(StoreError, match="rolled this transaction back"):
                await unit.session.execute("INSERT INTO stock VALUES (2)")
            await unit.add([new("m")])
    async with store.begin() as unit:
        assert [] == await unit.session.fetchall("SELECT n FROM stock")
    assert [] == await claimed(store)


async def test_a_session_ends_with_its_transaction(store: SQLiteStore) -> None:
    """A session kept beyond its transaction refuses."""
    async with store.begin() as unit:
        session = unit.session
        await session.execute("CREATE TABLE stock (n)")
    with pytest.raises(TransactionClosedError):
        await session.execute("INSERT INTO stock VALUES (1)")
    with pytest.raises(ValueError, match="without session="):
        store.begin(session)


async def test_file_and_its_companions_are_the_owners_alone(path: Path) -> None:
    """The file, its log and its index are made with mode 0600, whatever the umask."""
    before = os.umask(0)
    try:
        async with SQLiteStore(path) as store:
            await store.add([])
            modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600} == modes


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
async def test_a_symbolic_link_is_refused(path: Path, tmp_path: Path, suffix: str) -> None:
    """Neither the file nor its companions may be a symbolic link, dangling or not."""
    Path(f"{path}{suffix}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        async with SQLiteStore(path):
            pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("synchronous", "level"), [("full", 2), ("normal", 1)])
async def test_synchronous(path: Path, synchronous: Any, level: int) -> None:
    """Full is the default; both run in WAL mode."""
    kept = SQLiteStore(path) if synchronous == "full" else SQLiteStore(path, synchronous=synchronous)
    async with kept as store:
        assert (level,) == await writer(store, lambda one: one.execute("PRAGMA synchronous").fetchone())
        assert ("wal",) == await writer(store, lambda one: one.execute("PRAGMA journal_mode").fetchone())


async def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes are relative, four absolute; the path is percent-decoded; options are checked."""
    monkeypatch.chdir(tmp_path)
    for url, name in (
        ("sqlite:///a.db", "a.db"),
        ("sqlite:///b%20%3F%23.db?synchronous=normal", "b ?#.db"),
        (f"sqlite:///{tmp_path}/c.db", "c.db"),
    ):
        async with connect(url):
            assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    "url",
    ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://host/a.db", "sqlite:///a.db?mode=ro", "sqlite:///a#b",
     "sqlite:///a.db?synchronous=off", "sqlite:///a.db?synchronous", "sqlite:///a.db?", "sqlite+apsw:///a.db"],
)  # fmt: skip
def test_bad_urls(url: str) -> None:
    """A URL that says something else is refused when it is read."""
    if url.endswith("?"):
        assert connect(url).shared  # an empty query says nothing
        return
    with pytest.raises(ValueError, match=r"SQLite|sqlite|synchronous|bad query"):
        connect(url)


@pytest.mark.parametrize("text", ["a\0b", "\0", "a\0", "\0a"])
async def test_nul(store: SQLiteStore, text: str) -> None:
    """A NUL is a character like others in ids, keys, types, names and errors."""
    recipient = Recipient(f"svc/{text}", ordered=True)
    await store.announce([Interest(recipient.name, text, ordered=True)])
    for id_ in (text, text.replace("\0", "")):
        await store.add([NewEntry(message_id=id_, type=text, body=b"", key=f"k{id_}")])
    found = (await store.claim(recipient, owner="w", limit=9, lease=30.0)).entries
    assert {(text, f"k{text}"), (text.replace("\0", ""), f"k{text.replace(chr(0), '')}")} == {
        (one.message_id, one.lane) for one in found
    }
    await store.settle([Settlement(one.seq, one.claims, "dead", error=f"\ud800 {text}!") for one in found])
    assert 2 == len(await store.dead(DeadFilter(error=f"{text}!", handler=recipient.name)))


async def test_close_ends_threads_and_open_transactions(path: Path) -> None:
    """Closing finishes what waits, rolls back what is open, and leaves no thread."""
    store = SQLiteStore(path)
    await store.__aenter__()
    await store.announce([Interest(H.name, "t")])
    unit = store.begin()
    await unit.__aenter__()
    await unit.session.execute("CREATE TABLE stock (n)")
    async with anyio.create_task_group() as group:
        group.start_soon(store.add, [new("m")])
        await settle_ticks()
        await store.__aexit__(None, None, None)
    with pytest.raises(StoreError):
        await unit.session.execute("INSERT INTO stock VALUES (1)")
    with pytest.raises(StoreError):
        await unit.__aexit__(None, None, None)
    with pytest.raises(StoreError, match="not open"):
        await store.add([new("n")])
    assert [] == [one.name for one in threading.enumerate() if one.name.startswith("eventbus")]
    async with store:
        assert ["m"] == await claimed(store)
        with pytest.raises(StoreError, match="open already"):
            await store.__aenter__()
        async with store.begin() as unit:
            assert [] == await unit.session.fetchall("SELECT 1 FROM sqlite_master WHERE name = 'stock'")


async def test_limits_of_a_claim_do_not_grow_with_what_waits(tmp_path: Path) -> None:
    """A claim takes as many steps of SQLite with twenty times as much waiting, keyed and unkeyed."""
    for recipient in (H, Recipient("svc/o", ordered=True)):
        steps: list[int] = []
        for count in (1_000, 20_000):
            async with SQLiteStore(tmp_path / f"{count}{recipient.ordered}.db", synchronous="normal") as store:
                await store.announce([Interest(recipient.name, "t", recipient.ordered)])
                await store.add([new(str(n), key=f"k{n % 500}") for n in range(count)])
                await writer(store, lambda one: one.execute("ANALYZE").fetchall())
                ticks: list[int] = []
                await writer(store, lambda one, ticks=ticks: one.set_progress_handler(lambda: ticks.append(1), 10))
                found = await store.claim(recipient, owner="w", limit=64, lease=30.0)
                await store.settle([Settlement(one.seq, one.claims, "done") for one in found.entries])
                assert len(found.entries) == 64
                steps.append(len(ticks))
        assert steps[1] <= 1.5 * steps[0]


async def test_what_another_process_announces_counts_at_once(path: Path, store: SQLiteStore) -> None:
    """Who is announced, or forgotten, through another connection is known to the next publish."""
    async with SQLiteStore(path) as other:
        await other.announce([Interest("svc/new", "t")])
        assert {H.name, "svc/new"} == await store.add([new("a")])
        await other.forget(H.name)
        assert {"svc/new"} == await store.add([new("b")])
        await other.announce([Interest("svc/late", "t")])
        async with store.begin() as unit:
            await unit.add([new("c")])
        late = await store.claim(Recipient("svc/late"), owner="w", limit=9, lease=30.0)
        assert ["c"] == [one.message_id for one in late.entries]


async def test_other_writers_are_noticed(path: Path, store: SQLiteStore) -> None:
    """Listening wakes when another process may have written; with a bound clock it only waits."""
    woken = anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(store.listen, woken.set)
        async with SQLiteStore(path) as other:
            with anyio.fail_after(10):
                while not woken.is_set():
                    await other.add([new(str(anyio.current_time()))])
        group.cancel_scope.cancel()
    assert await claimed(store)
