"""Prove what the worker makes of entries: leases, fences, order, poison, deploys, drain."""

import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from eventbus import Context, Event, EventBus, Limits, Module, Reject, Retry, RetryLater, StoreError, Transaction
from eventbus.claims import Claims
from eventbus.clock import Runtime
from eventbus.ledger import Ledger
from eventbus.retry import Again
from eventbus.store import Claimed, NewEntry, Recipient, Settlement
from eventbus.stores._sqlite_unit import SQLiteUnit
from eventbus.stores.memory import MemoryStore
from eventbus.stores.sqlite import SQLiteSession, SQLiteStore
from eventbus.testing.clock import VirtualClock
from eventbus.testing.harness import harness


class Paid(Event, name="s.paid", key="account"):
    """State that something was paid."""

    number: int
    account: str = "a"


class Refunded(Event, name="s.refunded"):
    """State that something was paid back."""

    number: int


class PaidNewer(Event, name="s.paid", version=2):
    """Be the same event in the version of a later deploy."""

    number: int
    account: str = "a"
    currency: str


ROUTES = {"s.*": "store"}


def make(path: Path, module: Module, **options: Any) -> EventBus:
    """Return a bus on an SQLite file; none of these tests cuts the power, and some commit thousands of times."""
    return EventBus(module, name="svc", store=SQLiteStore(path, synchronous="normal"), routes=ROUTES, **options)


def rows(path: Path, sql: str, *params: Any) -> list[tuple[Any, ...]]:
    """Read, or write, past the store."""
    with sqlite3.connect(path) as database:
        found = database.execute(sql, params).fetchall()
    database.close()
    return found


async def publish(bus: EventBus, *events: object) -> None:
    """Publish in one transaction."""
    async with bus.transaction():
        for event in events:
            await bus.publish(event)


async def test_retry_counts_failures_and_ends_among_the_dead(tmp_path: Path) -> None:
    """A handler that always fails is tried as often as its Retry says, at its times, then its message is dead."""
    module, seen = Module("m"), list[tuple[int, float]]()
    bus = make(tmp_path / "s.db", module)

    @module.on(Paid, retry=Retry(attempts=3, initial=10.0, jitter=False))
    async def fails(event: Paid, ctx: Context) -> None:
        seen.append((ctx.attempt, t.clock.now() - start))
        raise ValueError("no")

    async with harness(bus) as t:
        start = t.clock.now()
        await publish(bus, Paid(number=1))
        await t.settled()
        await t.advance(100)
        assert [(1, 0.0), (2, 10.0), (3, 30.0)] == seen
        assert [(3, "failed 3 times; last: ValueError: no")] == [(one.failures, one.error) for one in t.dead]


async def test_one_failing_handler_leaves_its_sibling_alone(tmp_path: Path) -> None:
    """Each handler has an entry of its own: the retries of one never run the other again."""
    module, seen = Module("m"), list[str]()
    bus = make(tmp_path / "s.db", module)

    @module.on(Paid)
    async def good(event: Paid) -> None:
        seen.append("good")

    @module.on(Paid, retry=Retry(attempts=4, initial=1.0))
    async def bad(event: Paid) -> None:
        seen.append("bad")
        if seen.count("bad") < 3:
            raise RetryLater(5.0)

    async with harness(bus) as t:
        await publish(bus, Paid(number=1))
        await t.settled()
        await t.advance(60)
        assert [] == t.dead
    assert (1, 3) == (seen.count("good"), seen.count("bad"))


async def test_order_is_kept_per_key_though_a_head_fails(tmp_path: Path) -> None:
    """An ordered handler gets a key's messages in order, and a failing head delays its own key only."""
    module, seen = Module("m"), list[tuple[str, int]]()
    bus = make(tmp_path / "s.db", module)

    @module.on(Paid, ordered=True, retry=Retry(attempts=5, initial=1.0, jitter=False))
    async def book(event: Paid, ctx: Context) -> None:
        await anyio.lowlevel.checkpoint()
        if event.account == "a" and event.number == 1 and ctx.attempt < 4:
            raise ValueError("not yet")
        seen.append((event.account, event.number))

    async with harness(bus) as t:
        await publish(bus, *[Paid(number=number, account=account) for number in range(5) for account in "ab"])
        await t.settled()
        assert [("b", number) for number in range(5)] == [one for one in seen if one[0] == "b"]
        assert [("a", 0)] == [one for one in seen if one[0] == "a"]
        await t.advance(60)
        assert len(t.failed(book)) == 3
        assert [("a", number) for number in range(5)] == [one for one in seen if one[0] == "a"]


@pytest.mark.parametrize(("on_dead", "after"), [("continue", [0, 2, 3]), ("block", [0])])
async def test_a_dead_head_lets_its_lane_go_on_or_blocks_it(tmp_path: Path, on_dead: Any, after: list[int]) -> None:
    """After a death the key goes on or waits for a replay, as ``on_dead`` says."""
    module, seen, healed = Module("m"), list[int](), False
    bus = make(tmp_path / "s.db", module)

    @module.on(Paid, ordered=True, on_dead=on_dead)
    async def book(event: Paid) -> None:
        if event.number == 1 and not healed:
            raise Reject("never")
        seen.append(event.number)

    async with harness(bus) as t:
        await publish(bus, *[Paid(number=number) for number in range(4)])
        await t.settled()
        assert after == seen
        assert 1 == len(t.dead)
        healed = True
        await bus.dead.replay(handler="m.book")
        await t.settled()
        await t.advance(10)
        assert [0, 1, 2, 3] == (seen if on_dead == "block" else sorted(seen))


async def test_a_lapsed_lease_is_taken_by_another_and_the_late_settle_is_refused(tmp_path: Path) -> None:
    """A handler slower than its lease is run again elsewhere, and what it writes at last changes nothing."""
    module, other = Module("m"), Module("m")
    path, started, taken, release = tmp_path / "s.db", anyio.Event(), anyio.Event(), anyio.Event()

    @module.on(Paid, concurrency=1)
    async def book(event: Paid) -> None:
        started.set()
        await release.wait()
        raise ValueError("too late to count")

    @other.on(Paid, name="book")
    async def again(event: Paid) -> None:
        taken.set()

    slow = make(path, module, limits=Limits(lease=0.3, sweep=0.1))
    fast = make(path, other, limits=Limits(lease=0.3, sweep=0.05))
    async with slow.running():
        engine = slow.engine
        await publish(slow, Paid(number=1))
        worker = engine.worker
        assert worker is not None
        await started.wait()
        rows(path, "UPDATE eventbus_entry SET claims = claims + 1, due_at = 0")  # somebody else claimed it and died
        async with fast.running():
            with anyio.fail_after(20):
                await taken.wait()
        release.set()
        with anyio.fail_after(20):
            while sum(channel.lease_lost for channel in worker.channels) == 0:
                await worker.changed.wait()
    assert [(1, 0)] == rows(path, "SELECT state, failures FROM eventbus_entry")


POISON: dict[str, Callable[[bytes], bytes]] = {
    "no JSON": lambda body: b"\xff\xfe{",
    "cut off": lambda body: body[: len(body) // 2],
    "NaN": lambda body: body.replace(b'"number":1', b'"number":NaN'),
    "duplicate key": lambda body: body.replace(b'"number":1', b'"number":1,"number":2'),
    "too deep": lambda body: body.replace(b'"number":1', b'"number":' + b"[" * 10_000 + b"]" * 10_000),
    "oversized": lambda body: body.replace(b'"account":"a"', b'"account":"' + b"x" * 3_000_000 + b'"'),
    "wrong type": lambda body: body.replace(b'"number":1', b'"number":"one"'),
    "no envelope": lambda body: b"[]",
}


@pytest.mark.parametrize("poison", POISON)
async def test_a_bad_row_dies_with_a_reason_and_its_neighbours_live(tmp_path: Path, poison: str) -> None:
    """A row that cannot be decoded is dead at once, says why without its contents, and disturbs no other."""
    module, seen, path = Module("m"), list[int](), tmp_path / "s.db"
    bus = make(path, module)

    @module.on(Paid)
    async def book(event: Paid) -> None:
        seen.append(event.number)

    async with bus.running(consume=False):
        await publish(bus, Paid(number=0), Paid(number=1), Paid(number=2))
    ((body,),) = rows(path, "SELECT body FROM eventbus_entry WHERE seq = 2")
    rows(path, "UPDATE eventbus_entry SET body = ? WHERE seq = 2", POISON[poison](body))
    async with harness(bus) as t:
        await t.settled()
        assert [0, 2] == sorted(seen)
        assert 1 == len(t.dead)
        assert 0 < len(t.dead[0].error) <= 2_000
        assert "xxxx" not in t.dead[0].error


async def test_an_unknown_name_or_newer_version_waits_for_a_deploy(tmp_path: Path) -> None:
    """What a later deploy wrote is released uncounted until that deploy reads it, and is dead after a day."""
    path, seen = tmp_path / "s.db", list[str]()
    newer, older, latest = Module("m"), Module("m"), Module("m")

    @newer.on(PaidNewer, name="book")
    async def book_newer(event: PaidNewer) -> None: ...

    @older.on(Paid, name="book")
    async def book_older(event: Paid) -> None:
        seen.append("old")

    @latest.on(PaidNewer, name="book")
    async def book_latest(event: PaidNewer) -> None:
        seen.append(event.currency)

    async with make(path, newer).running(consume=False) as bus:
        await publish(bus, PaidNewer(number=1, currency="EUR"), PaidNewer(number=2, currency="USD"))
    async with harness(make(path, older)) as t:
        await t.settled()
        await t.advance(3_600)
        assert [] == t.dead
        assert [] == seen
    assert [(0, 0), (0, 0)] == rows(path, "SELECT state, failures FROM eventbus_entry")
    rows(path, "UPDATE eventbus_entry SET due_at = 0")
    async with harness(make(path, latest)) as t:
        await t.settled()
    assert ["EUR", "USD"] == sorted(seen)


async def test_a_renamed_handler_takes_over_by_its_alias(tmp_path: Path) -> None:
    """Entries written for the former name are handled under the new one."""
    path, seen = tmp_path / "s.db", list[int]()
    before, after = Module("m"), Module("m")

    @before.on(Paid)
    async def old_name(event: Paid) -> None: ...

    @after.on(Paid, aliases=["m.old_name"])
    async def new_name(event: Paid) -> None:
        seen.append(event.number)

    async with make(path, before).running(consume=False) as bus:
        await publish(bus, Paid(number=1))
    async with harness(make(path, after)) as t:
        await t.settled()
    assert [1] == seen


async def test_a_process_with_half_the_modules_reaches_all_handlers(tmp_path: Path) -> None:
    """Who is announced in the database gets an entry, whichever process publishes."""
    path, seen = tmp_path / "s.db", list[int]()
    web, worker = Module("web", messages=[Paid]), Module("worker")

    @worker.on(Paid)
    async def book(event: Paid) -> None:
        seen.append(event.number)

    async with make(path, worker).running(consume=False):
        pass
    async with make(path, web).running(consume=False) as bus:
        await publish(bus, Paid(number=1))
    async with harness(make(path, worker)) as t:
        await t.settled()
    assert [1] == seen


async def test_a_crash_loop_ends(tmp_path: Path) -> None:
    """A message whose claims end again and again without a word is dead, not claimed for ever."""
    path, module, seen = tmp_path / "s.db", Module("m"), list[int]()

    @module.on(Paid)
    async def book(event: Paid) -> None:
        seen.append(event.number)

    async with make(path, module).running(consume=False) as bus:
        await publish(bus, Paid(number=1))
    rows(path, "UPDATE eventbus_entry SET claims = claims + 11")
    async with harness(make(path, module)) as t:
        await t.settled()
        assert [] == seen
        assert ["crash loop" in one.error for one in t.dead] == [True]


async def test_drain_hands_back_what_was_not_started_and_fails_nothing(tmp_path: Path) -> None:
    """At the end running handlers finish, the rest is due at once for others, and no failure is counted."""
    path, module, started, release = tmp_path / "s.db", Module("m"), anyio.Event(), anyio.Event()

    @module.on(Paid, concurrency=1)
    async def book(event: Paid) -> None:
        started.set()
        await release.wait()

    bus = make(path, module, limits=Limits(lease=60.0))
    async with anyio.create_task_group() as group, bus.running():
        await publish(bus, *[Paid(number=number) for number in range(5)])
        await started.wait()
        group.start_soon(_release_when_stopping, bus, release)
    now = rows(path, "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)")[0][0]
    states = rows(path, "SELECT state, failures, owner, due_at <= ? FROM eventbus_entry ORDER BY seq", now)
    assert [(1, 0, None, 1), *[(0, 0, None, 1)] * 4] == states


async def _release_when_stopping(bus: EventBus, release: anyio.Event) -> None:
    while bus.engine.state == "running":
        await anyio.lowlevel.checkpoint()
    release.set()


async def test_drain_gives_up_a_handler_that_does_not_end(tmp_path: Path) -> None:
    """A handler longer than the drain time is cancelled, its message handed back and not failed."""
    path, module, started = tmp_path / "s.db", Module("m"), anyio.Event()

    @module.on(Paid)
    async def book(event: Paid, tx: Transaction[SQLiteSession]) -> None:
        await tx.session.execute("CREATE TABLE torn (number INTEGER)")
        started.set()
        await anyio.sleep_forever()

    bus = make(path, module, limits=Limits(drain=0.2))
    with anyio.fail_after(10):
        async with bus.running():
            await publish(bus, Paid(number=1))
            await started.wait()
    assert [(0, 0, None)] == rows(path, "SELECT state, failures, owner FROM eventbus_entry")
    assert [] == rows(path, "SELECT name FROM sqlite_master WHERE name = 'torn'")


async def test_a_store_that_cannot_be_opened_is_a_typed_error(tmp_path: Path) -> None:
    """A folder that is not there, or a file that is no database, is a StoreError at start-up, unwrapped."""
    with pytest.raises(StoreError):
        async with make(tmp_path / "absent" / "s.db", Module("m", messages=[Paid])).running():
            pass
    (tmp_path / "text.db").write_text(json.dumps({"no": "database"}) * 100)
    with pytest.raises(StoreError):
        async with make(tmp_path / "text.db", Module("m", messages=[Paid])).running():
            pass


async def test_a_broker_in_front_of_a_store_is_ingested_and_fed_through_it(tmp_path: Path) -> None:
    """With a store, a broker gets what was committed and gives what it brings to the store, once per message."""
    module, seen = Module("m"), list[int]()
    bus = EventBus(
        module, name="svc", store=SQLiteStore(tmp_path / "s.db"), transports={"events": "memory://"},
        routes={"s.*": ["events"]},
    )  # fmt: skip

    @module.on(Paid, ordered=True)
    async def book(event: Paid) -> None:
        seen.append(event.number)

    async with harness(bus) as t:
        await publish(bus, *[Paid(number=number) for number in range(5)])
        await t.settled()
        assert list(range(5)) == seen
    names = rows(tmp_path / "s.db", "SELECT DISTINCT recipient FROM eventbus_entry ORDER BY recipient")
    assert [("svc/m.book",), ("svc>events",)] == names


class Away(MemoryStore):
    """Take nothing in from outside while it is away."""

    away = False
    tried = 0

    async def add(self, entries: Sequence[NewEntry]) -> frozenset[str]:
        if not entries[0].subscribers and entries[0].recipients[0].name == "svc/m.book":
            self.tried += 1
            if self.away:
                raise StoreError("away")
        return await super().add(entries)


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_store_that_was_away_for_a_moment_takes_in_what_came_a_moment_later(ordered: bool) -> None:
    """What a broker brings while the store is away waits about as long as that, and never long; nothing is lost."""
    module, store, seen = Module("m"), Away(), list[int]()

    @module.on(Paid, ordered=ordered)
    async def book(event: Paid) -> None:
        seen.append(event.number)

    bus = EventBus(
        module, name="svc", store=store, transports={"events": "memory://"}, routes={"s.*": ["events"]},
    )  # fmt: skip
    async with harness(bus) as t:
        for away, late in ((0.3, 1.0), (600.0, 10.0)):
            seen.clear()
            store.away, store.tried = True, 0
            await publish(bus, *[Paid(number=number, account=str(number % 8)) for number in range(12)])
            await t.advance(away)
            assert store.tried > 0 == len(seen)
            store.away = False
            await t.advance(late)
            assert sorted(seen) == list(range(12))


@pytest.mark.timeout(180)  # a day of half minutes
async def test_a_handler_is_not_given_what_it_no_longer_wants(tmp_path: Path) -> None:
    """An entry written for a type that the handler has left waits for another deploy and is not handled."""
    path, seen = tmp_path / "s.db", list[object]()
    before, after = Module("m"), Module("m", messages=[Refunded])

    @before.on(Paid, Refunded)
    async def book(event: Paid | Refunded) -> None: ...

    @after.on(Paid, name="book")
    async def book_less(event: Paid) -> None:
        seen.append(event)

    async with make(path, before).running(consume=False) as bus:
        await publish(bus, Paid(number=1), Refunded(number=2))
    async with harness(make(path, after)) as t:
        await t.settled()
        assert [] == t.dead
        await t.advance(86_500)
        assert ["does not handle 's.refunded'" in one.error for one in t.dead] == [True]
    assert [Paid(number=1)] == seen


async def test_whose_transaction_cannot_begin_comes_again_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message whose handler waits in vain for its turn to write goes back, however often, and has not failed."""
    module, seen, waiting, handled = Module("m"), list[int](), 3, anyio.Event()
    store = MemoryStore()
    begin = store.begin

    @asynccontextmanager
    async def begin_in_turn(session: object | None = None) -> AsyncIterator[Any]:
        nonlocal waiting
        if waiting:
            waiting -= 1
            await anyio.sleep_forever()
        async with begin(session) as unit:
            yield unit

    @module.on(Paid, timeout=0.05, retry=Retry(attempts=1))
    async def book(event: Paid, ctx: Context, tx: Transaction[Any]) -> None:
        seen.append(ctx.attempt)
        handled.set()

    monkeypatch.setattr(store, "begin", begin_in_turn)
    bus = EventBus(module, name="svc", store=store, routes=ROUTES)
    async with bus.running():
        await bus.publish(Paid(number=1), atomic=False)
        with anyio.fail_after(30.0):
            await handled.wait()
        assert [] == await bus.dead.find()
    assert (0, [1]) == (waiting, seen)


async def test_whose_time_runs_out_in_its_transaction_has_failed() -> None:
    """A handler that has begun and does not finish in time has failed, and is dead after its last attempt."""
    module = Module("m")

    @module.on(Paid, timeout=2.0, retry=Retry(attempts=1))
    async def book(event: Paid, tx: Transaction[Any]) -> None:
        await anyio.sleep_forever()

    async with harness(EventBus(module, name="svc", store=MemoryStore(), routes=ROUTES)) as t:
        await t.publish(Paid(number=1))
        await t.advance(2.0)
        assert ["timeout" in one.error for one in t.dead] == [True]


async def test_an_endless_delay_harms_nobody(tmp_path: Path) -> None:
    """A handler that asks for its message in an aeon delays that message only."""
    module, seen = Module("m"), list[int]()
    bus = make(tmp_path / "s.db", module)

    @module.on(Paid)
    async def book(event: Paid) -> None:
        if event.number == 1:
            raise RetryLater(1e17)
        seen.append(event.number)

    async with harness(bus) as t:
        await publish(bus, Paid(number=1), Paid(number=2))
        await t.settled()
        assert [2] == seen
        assert [] == t.dead


async def test_a_handler_with_too_many_dead_pauses_until_some_are_gone(tmp_path: Path) -> None:
    """At the ceiling of its dead a handler claims nothing more, and drops nothing."""
    module, healed = Module("m"), False
    bus = make(tmp_path / "s.db", module, limits=Limits(dead=3))

    @module.on(Paid, concurrency=1, retry=Retry(attempts=1))
    async def book(event: Paid) -> None:
        if not healed:
            raise Reject("no")

    async with harness(bus) as t:
        await publish(bus, *[Paid(number=number) for number in range(10)])
        await t.settled()
        assert 3 <= len(t.dead) <= 4
        await t.advance(60)
        assert 3 <= len(t.dead) <= 4
        healed = True
        await bus.dead.replay(handler="m.book")
        await t.advance(60)
        assert [] == t.dead
    assert [(1, 10)] == rows(tmp_path / "s.db", "SELECT state, count(*) FROM eventbus_entry GROUP BY state")


async def test_discarding_a_dead_head_lets_its_lane_go_on_at_once(tmp_path: Path) -> None:
    """What stood behind a dead message that blocked its key comes as soon as an operator discards it."""
    module, seen = Module("m"), list[int]()
    bus = make(tmp_path / "s.db", module)

    @module.on(Paid, ordered=True, on_dead="block")
    async def book(event: Paid) -> None:
        if event.number == 0:
            raise Reject("never")
        seen.append(event.number)

    async with harness(bus) as t:
        await publish(bus, Paid(number=0), Paid(number=1))
        await t.settled()
        assert 1 == len(t.dead)
        assert 1 == await bus.dead.discard(handler="m.book")
        await t.settled()
        assert [1] == seen


@pytest.mark.parametrize("verb", ["lock", "settle"])
async def test_a_failing_store_is_no_failure_of_the_handler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """What the store fails to do around a handler costs no attempt: the lease decides, and the effect is there once."""
    module, attempts, troubles = Module("m"), list[int](), 3
    bus = make(tmp_path / "s.db", module)
    original = getattr(SQLiteUnit, verb)

    async def failing(self: SQLiteUnit, *args: Any) -> Any:
        nonlocal troubles
        if troubles:
            troubles -= 1
            raise StoreError("the connection is dead")
        return await original(self, *args)

    @module.on(Paid, retry=Retry(attempts=2))
    async def book(event: Paid, ctx: Context, tx: Transaction[Any]) -> None:
        attempts.append(ctx.attempt)

    monkeypatch.setattr(SQLiteUnit, verb, failing)
    async with harness(bus) as t:
        await publish(bus, Paid(number=1))
        await t.settled()
        await t.advance(4 * bus.limits.lease)
        assert [] == t.dead
    assert troubles == 0
    assert set(attempts) == {1}


class Counting(MemoryStore):
    """Count statements."""

    def __init__(self) -> None:
        super().__init__()
        self.claims = self.settlements = 0

    async def claim(self, *args: Any, **options: Any) -> Claimed:
        """Count it."""
        self.claims += 1
        return await super().claim(*args, **options)

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Count it."""
        self.settlements += 1
        return await super().settle(settlements)


async def test_statements_are_for_many_entries() -> None:
    """A handler that takes no transaction costs two statements for as many entries as it has slots, or few more."""
    module, handled, over, store = Module("m"), list[int](), anyio.Event(), Counting()

    @module.on(Paid, concurrency=50)
    async def take(event: Paid) -> None:
        handled.append(event.number)
        if len(handled) == 1_000:
            over.set()

    bus = EventBus(module, name="svc", store=store, routes=ROUTES)
    async with bus.running(consume=False):
        await bus.publish_many([Paid(number=number) for number in range(1_000)], atomic=False)
    async with bus.running():
        with anyio.fail_after(30):
            await over.wait()
    assert list(range(1_000)) == sorted(handled)
    assert store.settlements <= 3 * 1_000 / 50
    assert store.claims <= 1_000 / 50


async def test_retries_that_are_over_are_not_remembered() -> None:
    """A handler that is never idle keeps the times of the retries to come, and not of all that ever were."""
    clock = VirtualClock()
    claims = Claims(Ledger(MemoryStore(), Runtime(clock), Limits()), Recipient("svc/m.busy"), 1)
    for _ in range(100):
        claims.settled(Again(1.0))
        clock.jump(clock.monotonic() + 2.0)
    assert len(claims._dues) == 1
