"""Run each store against a model that is simple enough to be believed."""

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import NullPool

from eventbus.store import DeadFilter, Entry, Interest, NewEntry, Recipient, Settlement, Store, connect
from eventbus.stores.memory import MemoryStore
from eventbus.stores.sqlalchemy import SQLAlchemyStore
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing.store_desk import HandClock
from tests.stores.databases import CASES, a_database
from tests.stores.model import LEASE, RETENTION, Model, Row

RECIPIENTS = (Recipient("svc/plain"), Recipient("svc/ordered", ordered=True))
IDS = st.integers(0, 40).map(str)
KEYS = st.sampled_from([None, "a", "b", "c"])
DELAYS = st.sampled_from([0.0, 0.0, 0.0, 7.0])
OUTCOMES = st.sampled_from(["done", "done", "again", "release", "dead"])
WHO = st.sampled_from(RECIPIENTS)


class Undo(Exception):  # noqa: N818 - no error
    """Roll a transaction back."""


class Machine(RuleBasedStateMachine):
    """Do the same to a store and to the model, and compare every answer."""

    make: ClassVar[Callable[[Path], Store]]
    backend: ClassVar[str]

    @initialize()
    def open(self) -> None:
        """Open an empty store with both handlers announced."""
        self.stack = ExitStack()
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.call = self.stack.enter_context(start_blocking_portal(self.backend)).call
        self.clock = HandClock()
        self.store = type(self).make(directory / "model.db")
        self.store.bind(self.clock)
        self.call(self.store.__aenter__)
        self.stack.callback(self.call, self.store.__aexit__, None, None, None)
        self.model = Model()
        self.model.now = self.clock.now()
        self.entries: list[Entry] = []
        self.cursor = ""
        for recipient in RECIPIENTS:
            self.announce(recipient)

    def teardown(self) -> None:
        """Close the store."""
        if hasattr(self, "stack"):
            self.stack.close()

    @rule(who=WHO)
    def announce(self, who: Recipient) -> None:
        """Announce a handler (again)."""
        self.call(self.store.announce, [Interest(who.name, "t", who.ordered)])
        self.model.wanted[who.name] = who

    @rule(id=IDS, key=KEYS, delay=DELAYS)
    def add(self, id: str, key: str | None, delay: float) -> None:
        """Publish a message by itself."""
        written = self.call(self.store.add, [_new(id, key, delay)])
        assert written == self.model.add(id, key, delay)

    @rule(ids=st.lists(st.tuples(IDS, KEYS), max_size=4), undone=st.lists(IDS, max_size=2), commits=st.booleans())
    def transact(self, ids: list[tuple[str, str | None]], undone: list[str], commits: bool) -> None:
        """Publish in a transaction, some of it in a savepoint that fails."""
        self.call(self._transact, ids, undone, commits)
        if commits:
            for id_, key in ids:
                self.model.add(id_, key, 0.0)

    async def _transact(self, ids: list[tuple[str, str | None]], undone: list[str], commits: bool) -> None:
        try:
            async with self.store.begin() as unit:
                for n, (id_, key) in enumerate(ids):
                    async with unit.savepoint():
                        await unit.add([_new(id_, key, 0.0)])
                    if n == 1:
                        await unit.lock(1, 1)
                try:
                    async with unit.savepoint():
                        await unit.add([_new(id_, None, 0.0) for id_ in undone])
                        raise Undo
                except Undo:
                    pass
                if not commits:
                    raise Undo
        except Undo:
            assert not commits

    @rule(who=WHO, limit=st.integers(1, 5))
    def claim(self, who: Recipient, limit: int) -> None:
        """Claim; which of the due rows come is the store's choice, how many is not."""
        claim = partial(self.store.claim, who, owner="w", limit=limit, lease=LEASE, cursor=self.cursor)
        claimed = self.call(claim)
        if who.ordered:
            self.cursor = claimed.cursor
        due = self.model.due(who)
        assert len(claimed.entries) == min(limit, len(due))
        for entry in claimed.entries:
            row = self.model.row(entry.message_id, entry.recipient)
            assert any(one is row for one in due)
            crashes = self.model.claim(row)
            assert (entry.claims, entry.failures, entry.crashes) == (row.claims, row.failures, crashes)
            assert (entry.lane, entry.type, entry.body) == (row.lane, "t", row.id.encode())
            self.entries.append(entry)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), outcome=OUTCOMES, after=st.sampled_from([0.0, 3.0]), blocks=st.booleans())
    def settle(self, data: Any, outcome: str, after: float, blocks: bool) -> None:
        """Settle claims, old ones too."""
        entries = data.draw(st.lists(st.sampled_from(self.entries), max_size=4, unique_by=lambda one: one.seq))
        lost: set[int] = set()
        for one in entries:
            row = self.model.held(one.message_id, one.recipient, one.claims)
            if row is None:
                lost.add(one.seq)
            else:
                self.model.settle(row, outcome, after, blocks)
        error = "boom" if outcome == "dead" else None
        batch = [Settlement(one.seq, one.claims, outcome, after, error, blocks) for one in entries]  # type: ignore[arg-type]
        assert self.call(self.store.settle, batch) == lost

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), id=IDS, commits=st.booleans())
    def handle(self, data: Any, id: str, commits: bool) -> None:
        """Settle a claim as done in a transaction that publishes."""
        entry = data.draw(st.sampled_from(self.entries))
        row = self.model.held(entry.message_id, entry.recipient, entry.claims)
        kept = self.call(self._handle, entry, id, commits)
        assert kept == (row is not None)
        if commits and row is not None:
            self.model.settle(row, "done", 0.0, False)
            self.model.add(id, None, 0.0)

    async def _handle(self, entry: Entry, id: str, commits: bool) -> bool:
        kept = False
        try:
            async with self.store.begin() as unit:
                kept = await unit.lock(entry.seq, entry.claims)
                assert kept == await unit.settle(Settlement(entry.seq, entry.claims, "done"))
                await unit.add([_new(id, None, 0.0)])
                if not commits or not kept:
                    raise Undo
        except Undo:
            pass
        return kept

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def extend(self, data: Any) -> None:
        """Extend a lease, an old one too."""
        entry = data.draw(st.sampled_from(self.entries))
        row = self.model.held(entry.message_id, entry.recipient, entry.claims)
        lost = self.call(self.store.extend, [(entry.seq, entry.claims)], LEASE)
        assert lost == (set() if row else {entry.seq})
        if row:
            row.due = self.model.now + LEASE

    @rule(seconds=st.sampled_from([1.0, 3.0, LEASE, RETENTION + 1]))
    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.advance(seconds)
        self.model.now = self.clock.now()

    @rule()
    def sweep(self) -> None:
        """Prune."""
        assert self.call(partial(self.store.sweep, retention=RETENTION, lease=LEASE, batch=1_000)) == self.model.sweep()

    @rule(who=WHO, replays=st.booleans())
    def bring_back(self, who: Recipient, replays: bool) -> None:
        """Replay or discard the dead of one handler."""
        rows = [row for row in self.model.of("dead") if row.recipient == who.name]
        chosen = DeadFilter(handler=who.name, limit=None)
        if replays:
            assert dict(self.call(self.store.replay, chosen)) == Counter(row.recipient for row in rows)
        else:
            assert self.call(self.store.discard, chosen) == len(rows)
        for row in rows:
            (self.model.replay if replays else self.model.discard)(row)

    @precondition(lambda self: len(self.entries) > 8)
    @rule(who=WHO)
    def forget(self, who: Recipient) -> None:
        """Forget a handler, until it is announced again."""
        assert self.call(self.store.forget, who.name) == self.model.forget(who.name)

    @invariant()
    def same_dead(self) -> None:
        """The dead are the same."""
        if hasattr(self, "stack"):
            dead = self.call(self.store.dead, DeadFilter(limit=None))
            found = [(one.message_id, one.handler, one.failures, one.error, one.time.timestamp()) for one in dead]
            assert sorted(found) == sorted(_shown(row) for row in self.model.of("dead"))
            assert [one.time for one in dead] == sorted(one.time for one in dead)

    @invariant()
    def same_counts(self) -> None:
        """What waits, and when it is due, is the same."""
        if hasattr(self, "stack"):
            waiting = {one.recipient: one.waiting for one in self.call(self.store.backlog) if one.waiting}
            assert waiting == Counter(row.recipient for row in self.model.of("ready"))
            due = self.call(self.store.due, [one.name for one in RECIPIENTS])
            for who in RECIPIENTS:
                first = min((row.due for row in self.model.claimable(who)), default=None)
                found = due.get(who.name)
                wait = None if first is None else max(first - self.model.now, 0.0)
                assert (found if found is None else max(found, 0.0)) == (wait if wait is None else pytest.approx(wait))


def _new(id: str, key: str | None, delay: float) -> NewEntry:
    return NewEntry(message_id=id, type="t", body=id.encode(), key=key, delay=delay)


def _shown(row: Row) -> tuple[str, str, int, str, float]:
    return (row.id, row.recipient, row.failures, row.error, row.due)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("name", "make", "examples"),
    [("memory", lambda path: MemoryStore(), 120), ("sqlite", lambda path: SQLiteStore(path, synchronous="normal"), 50)],
    ids=["memory", "sqlite"],
)
def test_model(name: str, make: Callable[[Path], Store], examples: int, backend: str) -> None:
    """The store answers everything as the model does."""
    check(name, make, backend, examples)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_model_of_sqlalchemy(kind: str, backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """So does the SQLAlchemy store, on every driver."""
    with a_database(kind, request, tmp_path) as database:

        def make(path: Path) -> Store:
            database.wipe()
            if kind.startswith("sync"):
                return SQLAlchemyStore(database.engine(poolclass=NullPool), create=True)
            return connect(f"{database.url}?create=true")

        check("sqlalchemy", make, backend, examples=10)


def check(name: str, make: Callable[[Path], Store], backend: str, examples: int) -> None:
    """Run the machine on a store."""
    machine = type(name, (Machine,), {"make": staticmethod(make), "backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
