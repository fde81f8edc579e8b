"""Prove what the SQLite store does when something is wrong: cancelled callers, full disks, lost and locked files."""
# ruff: noqa: ASYNC222, ASYNC240 - these tests break the store's file while it runs

import os
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from eventbus.errors import StoreError, StoreFullError, WrongLoopError
from eventbus.limits import Limits
from eventbus.store import Claimed, Interest, NewEntry, Recipient
from eventbus.stores import _sqlite_file
from eventbus.stores._sqlite_rows import Rows
from eventbus.stores.sqlite import SQLiteStore

H = Recipient("svc/h")
IMPATIENT = Limits(lease=0.2)
ROOT = Path(__file__).parents[2]


def new(id: str, body: bytes = b"body") -> NewEntry:
    """Return a message for the handler."""
    return NewEntry(message_id=id, type="t", body=body)


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


async def writer(store: SQLiteStore, verb: Callable[[sqlite3.Connection], Any]) -> Any:
    """Do something on the writer's own connection."""
    return await store._write(lambda rows, now: verb(rows.connection))


async def claimed(store: SQLiteStore) -> list[str]:
    """Claim everything due."""
    found: list[str] = []
    while entries := (await store.claim(H, owner="w", limit=1_000, lease=30.0)).entries:
        found += [one.message_id for one in entries]
    return found


async def tables(store: SQLiteStore) -> int:
    """Count the tables that tests make."""
    async with store.begin() as unit:
        ((count,),) = await unit.session.fetchall("SELECT count(*) FROM sqlite_master WHERE name LIKE 'stock%'")
    return int(count)


class Gate:
    """Hold the writer's thread inside a verb, so that a test knows where it is."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def pass_through(self, *_: object) -> None:
        """Wait in the writer's thread until the test opens the gate."""
        self.reached.set()
        self.open.wait(10)

    async def wait(self) -> None:
        """Wait in the test until the writer is inside."""
        await anyio.to_thread.run_sync(self.reached.wait, 10)


POINTS = ("at a statement", "between statements", "at the commit", "while queued", "in a savepoint")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("anyio_backend", "native"), [("asyncio", False), ("asyncio", True), ("trio", False)])
async def test_a_cancelled_holder_lets_go(store: SQLiteStore, point: str, native: bool) -> None:
    """Whoever is cancelled in a transaction, in whatever way and place, leaves nothing behind and nobody waiting."""
    gate, before = Gate(), Gate()
    started = anyio.Event()

    async def hold_first() -> None:
        async with store.begin() as unit:
            await unit._run(before.pass_through)

    async def transact() -> None:
        async with store.begin() as unit:
            await unit.add([new("gone")])
            if point == "while queued":
                started.set()
                await unit.session.execute("CREATE TABLE stock (n)")
            await unit.session.execute("CREATE TABLE stock (n)")
            started.set()
            if point == "at a statement":
                await unit._run(gate.pass_through)
            elif point == "between statements":
                await anyio.sleep_forever()
            elif point == "in a savepoint":
                async with unit.savepoint():
                    await unit.session.execute("INSERT INTO stock VALUES (1)")
                    await anyio.sleep_forever()
            else:
                await unit.add([new("gone too")])
                unit._steps.append(gate.pass_through)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            if point == "while queued":
                group.start_soon(hold_first)
                await before.wait()
            cancel = await _start(group, transact, native)
            await started.wait()
            if point in ("at a statement", "at the commit"):
                await gate.wait()
            else:
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
            cancel()
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            gate.open.set()
            before.open.set()
        await store.add([new("after")])
    committed = 1 if point == "at the commit" else 0  # it had begun: then it is done, or not, but wholly
    assert committed == await tables(store)
    assert (["gone", "gone too"] if committed else []) + ["after"] == await claimed(store)


async def _start(group: Any, job: Callable[[], Any], native: bool) -> Callable[[], object]:
    if not native:
        scope = anyio.CancelScope()

        async def scoped() -> None:
            with scope:
                await job()

        group.start_soon(scoped)
        return scope.cancel
    import asyncio

    task = asyncio.create_task(job())

    async def reap() -> None:
        await asyncio.wait([task])

    group.start_soon(reap)
    return task.cancel


async def test_a_commit_that_is_cancelled_in_the_queue_never_happens(store: SQLiteStore) -> None:
    """A transaction cancelled before its turn leaves nothing, and neither does a verb."""
    gate = Gate()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(store._write, gate.pass_through)
            await gate.wait()
            with anyio.move_on_after(0.01):
                async with store.begin() as unit:
                    await unit.add([new("gone")])
            with anyio.move_on_after(0.01):
                await store.add([new("gone too")])
            gate.open.set()
    assert [] == await claimed(store)


async def test_a_commit_that_is_cancelled_in_its_transaction_never_happens(store: SQLiteStore) -> None:
    """A commit that waits for a statement of its own transaction, and is cancelled there, is a rollback."""
    gate = Gate()
    whole, statement = anyio.CancelScope(), anyio.CancelScope()

    async def transact() -> None:
        with whole:
            async with store.begin() as unit:
                await unit.session.execute("CREATE TABLE stock (n)")
                with statement:
                    await unit._run(gate.pass_through)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(transact)
            await gate.wait()
            for scope in (statement, whole):
                scope.cancel()
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
            gate.open.set()
    assert 0 == await tables(store)


async def test_a_publish_that_fails_fails_its_transaction(store: SQLiteStore) -> None:
    """What was published cannot be left out: if it cannot be written nothing is committed, whatever is caught."""
    errors: list[Exception] = []
    with pytest.raises(ValueError, match="surrogates"):
        async with store.begin() as unit:
            await unit.session.execute("CREATE TABLE stock (n)")
            await unit.add([new("\ud800")])
            for _ in range(2):
                try:
                    await unit.session.execute("INSERT INTO stock VALUES (1)")
                except ValueError as error:
                    errors.append(error)
    assert 2 == len(errors)
    assert 0 == await tables(store)


async def test_what_a_cancelled_claimer_got_is_handed_back(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim whose caller is gone when it is committed is released at once, uncounted."""
    gate, claim = Gate(), Rows.claim

    def slow(self: Rows, *args: Any, **options: Any) -> Claimed:
        found = claim(self, *args, **options)
        gate.pass_through()
        return found

    await store.add([new("m")])
    monkeypatch.setattr(Rows, "claim", slow)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()

            async def claimer() -> None:
                with scope:
                    await store.claim(H, owner="w", limit=1, lease=30.0)

            group.start_soon(claimer)
            await gate.wait()
            scope.cancel()
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            gate.open.set()
        monkeypatch.undo()
        while not (entries := (await store.claim(H, owner="v", limit=1, lease=30.0)).entries):
            await anyio.lowlevel.checkpoint()
    assert [(2, 0, 0)] == [(one.claims, one.failures, one.crashes) for one in entries]


async def test_a_task_that_vanishes_lets_go(store: SQLiteStore) -> None:
    """A transaction is rolled back though its coroutine is thrown away and never awaits anything again."""
    unit = store.begin()
    await unit.session.execute("CREATE TABLE stock (n)")
    leaving = unit.__aexit__(GeneratorExit, GeneratorExit(), None)
    with pytest.raises(StopIteration):
        leaving.send(None)
    with anyio.fail_after(10):
        await store.add([new("m")])
    assert ["m"] == await claimed(store)
    assert 0 == await tables(store)


async def test_a_transaction_that_says_nothing_is_rolled_back(path: Path) -> None:
    """Nobody keeps the writer for longer than a lease without a word; who comes back is told."""
    async with SQLiteStore(path, limits=IMPATIENT) as store:
        unit = store.begin()
        await unit.__aenter__()
        await unit.session.execute("CREATE TABLE stock (n)")
        with anyio.fail_after(10):
            await store.add([])
        with pytest.raises(StoreError, match="kept everybody waiting"):
            await unit.session.execute("INSERT INTO stock VALUES (1)")
        with pytest.raises(StoreError, match="kept everybody waiting"):
            await unit.__aexit__(None, None, None)
        assert 0 == await tables(store)


async def test_full_disk(store: SQLiteStore) -> None:
    """With no room left a verb says so, loses nothing that was confirmed, and works again when there is room."""
    pages = (await writer(store, lambda one: one.execute("PRAGMA page_count").fetchone()))[0]
    await writer(store, lambda one: one.execute(f"PRAGMA max_page_count = {pages + 30}").fetchone())
    confirmed: list[str] = []
    with pytest.raises(StoreFullError, match="room"):
        for n in range(1_000):
            await store.add([new(f"m{n}", b"x" * 3_000)])
            confirmed.append(f"m{n}")
    assert confirmed
    with pytest.raises(StoreFullError):
        async with store.begin() as unit:
            await unit.add([new("big", b"x" * 100_000)])
    await writer(store, lambda one: one.execute("PRAGMA max_page_count = 1000000").fetchone())
    await store.add([new("after")])
    assert [*confirmed, "after"] == await claimed(store)


async def test_full_disk_takes_only_the_verb_that_is_too_big(store: SQLiteStore) -> None:
    """Of verbs that wait together, those that fit are committed."""
    pages = (await writer(store, lambda one: one.execute("PRAGMA page_count").fetchone()))[0]
    await writer(store, lambda one: one.execute(f"PRAGMA max_page_count = {pages + 30}").fetchone())
    full: list[str] = []

    async def publish(id: str, body: bytes) -> None:
        try:
            await store.add([new(id, body)])
        except StoreFullError:
            full.append(id)

    async with anyio.create_task_group() as group, store.begin() as unit:
        await unit.session.execute("SELECT 1")
        for id_, size in (("a", 10), ("big", 1_000_000), ("b", 10)):
            group.start_soon(publish, id_, b"x" * size)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
    assert ["big"] == full
    assert ["a", "b"] == sorted(await claimed(store))


async def test_full_disk_in_a_transaction_commits_no_half(store: SQLiteStore) -> None:
    """After a full disk in a transaction none of it is committed, whatever the user goes on to do."""
    async with store.begin() as unit:
        await unit.session.execute("CREATE TABLE stock (n)")
    pages = (await writer(store, lambda one: one.execute("PRAGMA page_count").fetchone()))[0]
    await writer(store, lambda one: one.execute(f"PRAGMA max_page_count = {pages + 5}").fetchone())
    errors: list[Exception] = []
    with pytest.raises(StoreFullError):
        async with store.begin() as unit:
            await unit.session.execute("INSERT INTO stock VALUES (1)")
            await unit.add([new("m", b"x" * 100_000)])
            for n in (2, 3):
                try:
                    await unit.session.execute("INSERT INTO stock VALUES (?)", (n,))
                except StoreFullError as error:
                    errors.append(error)
    assert 2 == len(errors)
    async with store.begin() as unit:
        assert [] == await unit.session.fetchall("SELECT n FROM stock")
    assert [] == await claimed(store)


async def test_read_only(store: SQLiteStore) -> None:
    """What may not be written is a StoreError, and goes on when it may."""
    writing, store._lines[0]._begin = store._lines[0]._begin, "BEGIN"
    await writer(store, lambda one: one.execute("PRAGMA query_only = ON"))
    with pytest.raises(StoreError, match="readonly"):
        await store.add([new("m")])
    with pytest.raises(StoreError, match="readonly"):
        async with store.begin() as unit:
            await unit.session.execute("CREATE TABLE stock (n)")
    await writer(store, lambda one: one.execute("PRAGMA query_only = OFF"))
    store._lines[0]._begin = writing
    await store.add([new("m")])
    assert ["m"] == await claimed(store)


READ_ONLY = """
import os, sys, anyio, anyio.lowlevel
from eventbus.errors import StoreError
from eventbus.stores.sqlite import SQLiteStore
anyio.run(anyio.lowlevel.checkpoint)  # imports all it needs while it may
if os.getuid() == 0:
    os.setuid(65534)
async def main():
    try:
        async with SQLiteStore(sys.argv[1]) as store:
            await store.announce([])
            await store.forget("svc/h")
    except StoreError as error:
        print("StoreError", error)
anyio.run(main)
"""


def test_file_without_permission(tmp_path_factory: pytest.TempPathFactory, path: Path) -> None:
    """A file that this user may not write, or not even read, is a StoreError."""
    for mode in (0o444, 0o000):
        directory = tmp_path_factory.mktemp("readonly")
        for parent in (directory, *directory.parents[:2]):
            parent.chmod(0o755)
        file = directory / "store.db"
        anyio.run(_make, file)
        file.chmod(mode)
        child = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(file)],
            check=False, cwd=ROOT, capture_output=True, text=True, timeout=50,
        )  # fmt: skip
        assert child.stdout.startswith("StoreError"), child


async def _make(path: Path) -> None:
    async with SQLiteStore(path) as store:
        await store.announce([Interest(H.name, "t")])


async def test_a_file_that_is_gone_is_noticed(path: Path, store: SQLiteStore, tmp_path: Path) -> None:
    """A deleted or replaced file is a loud error, is not made anew, and put back it goes on."""
    await store.add([new("m")])
    away = tmp_path / "away"
    away.mkdir()
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").rename(away / f"{path.name}{suffix}")
    for use in (store.add([new("n")]), store.backlog(), store.due([H.name])):
        with pytest.raises(StoreError, match="gone"):
            await use
    with pytest.raises(StoreError, match="gone"):
        async with store.begin() as unit:
            await unit.session.execute("CREATE TABLE stock (n)")
    assert not path.exists()
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="replaced"):
        await store.add([new("n")])
    for suffix in ("", "-wal", "-shm"):
        (away / f"{path.name}{suffix}").rename(f"{path}{suffix}")
    await store.add([new("o")])
    assert ["m", "o"] == await claimed(store)


async def test_a_file_that_goes_during_a_commit_confirms_nothing(path: Path, store: SQLiteStore) -> None:
    """What is committed to a file that is gone by then is an error too, alone and in a transaction."""
    for use in ("verb", "transaction"):
        gate = Gate()

        async def write(use: str = use, gate: Gate = gate) -> None:
            with pytest.raises(StoreError, match="gone"):
                if use == "verb":
                    await store._write(gate.pass_through)
                else:
                    async with store.begin() as unit:
                        await unit._run(gate.pass_through)

        async with anyio.create_task_group() as group:
            group.start_soon(write)
            await gate.wait()
            path.rename(f"{path}.away")
            gate.open.set()
        Path(f"{path}.away").rename(path)
    await store.add([new("m")])
    assert ["m"] == await claimed(store)


async def test_a_corrupt_file_is_an_error(path: Path) -> None:
    """A file that is no database, and one that is damaged, are StoreErrors."""
    path.write_bytes(b"this is no database" * 1_000)
    with pytest.raises(StoreError, match="not a database"):
        async with SQLiteStore(path):
            pass
    path.unlink()
    async with SQLiteStore(path) as store:
        await store.announce([Interest(H.name, "t")])
        await store.add([new(f"m{n}", b"x" * 2_000) for n in range(200)])
    assert ["store.db"] == [one.name for one in path.parent.iterdir()]
    content = bytearray(path.read_bytes())
    content[4096:-4096] = b"\xa5" * (len(content) - 8192)
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"malformed|disk image"):
        async with SQLiteStore(path) as store:
            await claimed(store)


async def test_a_newer_schema_is_refused(path: Path) -> None:
    """A file of a newer eventbus is refused before anything is written to it."""
    await _make(path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE eventbus_schema SET version = 99")
    database.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"version 99.*up to 1"):
        async with SQLiteStore(path):
            pass
    assert before == path.read_bytes()


async def test_an_older_schema_is_upgraded_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upgrade is one transaction: when it fails the file is as it was, and the next start does it."""
    async with SQLiteStore(path) as store:
        await store.announce([Interest(H.name, "t")])
        await store.add([new("m")])
    added = "CREATE TABLE eventbus_later (n)"
    monkeypatch.setattr(_sqlite_file, "MIGRATIONS", (*_sqlite_file.MIGRATIONS, (added, "CREATE NONSENSE")))
    with pytest.raises(StoreError, match="syntax"):
        async with SQLiteStore(path):
            pass
    monkeypatch.setattr(_sqlite_file, "MIGRATIONS", (*_sqlite_file.MIGRATIONS[:1], (added,)))
    for _ in range(2):
        async with SQLiteStore(path) as store:
            tables = await writer(store, lambda one: one.execute("SELECT name FROM sqlite_master").fetchall())
            assert ("eventbus_later",) in tables
            version = await writer(store, lambda one: one.execute("SELECT version FROM eventbus_schema").fetchone())
            assert (2,) == version
    async with SQLiteStore(path) as store:
        assert ["m"] == await claimed(store)


async def test_another_process_that_writes_is_waited_for(path: Path, store: SQLiteStore) -> None:
    """While another connection writes ours waits; "database is locked" reaches nobody."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    done: list[str] = []

    async def publish() -> None:
        await store.add([new("m")])
        done.append("m")

    async with anyio.create_task_group() as group:
        group.start_soon(publish)
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert [] == done
        other.execute("ROLLBACK")
    other.close()
    assert ["m"] == await claimed(store)


async def test_a_lock_that_stays_is_an_error(path: Path) -> None:
    """When another connection never ends its transaction that is a StoreError, for verbs and transactions alike."""
    async with SQLiteStore(path, limits=IMPATIENT) as store:
        await store.announce([Interest(H.name, "t")])
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process has had it locked"):
            await store.add([new("m")])
        with pytest.raises(StoreError, match="another process has had it locked"):
            async with store.begin() as unit:
                await unit.session.execute("CREATE TABLE stock (n)")
        assert [H.name] == [one.recipient for one in await store.backlog()]
        other.execute("ROLLBACK")
        other.close()
        await store.add([new("m")])
        assert ["m"] == await claimed(store)


async def test_a_transaction_that_has_read_can_write(path: Path, store: SQLiteStore) -> None:
    """A transaction keeps writers out from its first statement on: what it read is still so when it writes."""
    async with SQLiteStore(path, limits=IMPATIENT) as other, store.begin() as unit:
        assert [] == await unit.session.fetchall("SELECT seq FROM eventbus_entry")
        with pytest.raises(StoreError, match="another process has had it locked"):
            await other.add([new("between")])
        await unit.session.execute("CREATE TABLE stock (n)")
        await unit.add([new("m")])
    assert ["m"] == await claimed(store)


async def test_another_thread_or_process_is_refused(store: SQLiteStore) -> None:
    """A store is used where it was opened: not in another thread, not after a fork."""

    def use() -> None:
        coroutine = store.add([new("m")])
        try:
            coroutine.send(None)
        finally:
            coroutine.close()

    with pytest.raises(WrongLoopError, match="another thread"):
        await anyio.to_thread.run_sync(use)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        try:
            use()
        except WrongLoopError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    await store.add([new("m")])
    assert ["m"] == await claimed(store)
