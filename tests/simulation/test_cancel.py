"""Cancel at every checkpoint, anyio's way and asyncio's own: neither success nor failure, and nothing left open."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from types import coroutine
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Context, Event, EventBus, Limits, Module, Transaction, channel
from eventbus.stores.sqlite import SQLiteSession


class Step(Event, name="cancel.step", key="key"):
    """Be published in rounds; one key keeps all of them in order."""

    round: int
    part: str
    key: str = "k"


@coroutine
def watched(call: Coroutine[Any, Any, Any], at: int, act: Callable[[], None]) -> Generator[Any, Any, int]:
    """Await a call, and do ``act`` when it suspends for the ``at``-th time; return how often it did."""
    count, step, value = 0, call.send, None
    while True:
        try:
            yielded = step(value)
        except StopIteration:
            return count
        count += 1
        if count == at:
            act()
        try:
            step, value = call.send, (yield yielded)
        except BaseException as error:
            step, value = call.throw, error


class Bench:
    """Hold a bus on a file, and what its handler has seen."""

    def __init__(self, file: Path) -> None:
        self.seen: list[tuple[int, str]] = []
        self.attempts: list[int] = []
        self.news = anyio.Event()
        self.during: Callable[[Step], Coroutine[Any, Any, None]] | None = None
        module = Module("cancel")

        @module.on(Step, ordered=True)
        async def step(event: Step, tx: Transaction[SQLiteSession], ctx: Context) -> None:
            self.attempts.append(ctx.attempt)
            await tx.session.execute("INSERT INTO seen VALUES (?, ?)", (event.round, event.part))
            if self.during is not None:
                await self.during(event)
            self.news.set()

        self.bus = EventBus(
            module, name="cancel", store=f"sqlite:///{file}", routes={Step: "store"}, limits=Limits(drain=2.0)
        )

    async def prepare(self) -> None:
        """Make the table of effects."""
        async with self.bus.transaction() as tx:
            await tx.session.execute("CREATE TABLE IF NOT EXISTS seen (round INTEGER, part TEXT)")

    async def rows(self) -> list[tuple[int, str]]:
        """Return the effects so far."""
        async with self.bus.transaction() as tx:
            found: list[tuple[int, str]] = await tx.session.fetchall("SELECT round, part FROM seen ORDER BY rowid")
            return [tuple(row) for row in found]

    async def until(self, effect: tuple[int, str]) -> list[tuple[int, str]]:
        """Wait for an effect; return all."""
        with anyio.fail_after(20.0):
            while True:
                self.news = anyio.Event()
                rows = await self.rows()
                if effect in rows:
                    return rows
                with anyio.move_on_after(0.2):
                    await self.news.wait()

    async def publish(self, round_: int) -> None:
        """Publish three parts in one transaction, one of them in a savepoint, beside a row of our own."""
        async with self.bus.transaction() as tx:
            await self.bus.publish(Step(round=round_, part="a"))
            async with self.bus.transaction():
                await tx.session.execute("INSERT INTO seen VALUES (?, ?)", (round_, "order"))
                await self.bus.publish(Step(round=round_, part="b"))
            await checkpoint()
            await self.bus.publish(Step(round=round_, part="c"))


async def cut_by_scope(call: Coroutine[Any, Any, Any], at: int) -> bool:
    """Cancel the scope around a call at its n-th checkpoint; tell whether it had that many."""
    with anyio.CancelScope() as scope:
        return await watched(call, at, scope.cancel) >= at
    return True


async def cut_by_task(call: Coroutine[Any, Any, Any], at: int) -> bool:
    """Cancel the task of a call at its n-th checkpoint, asyncio's own way; tell whether it had that many."""

    async def run() -> int:
        task = asyncio.current_task()
        assert task is not None
        return await watched(call, at, lambda: task.cancel() and None)

    try:
        return await asyncio.create_task(run()) >= at
    except asyncio.CancelledError:
        return True


async def publishes(file: Path, cut: Callable[[Coroutine[Any, Any, Any], int], Coroutine[Any, Any, bool]]) -> None:
    """Publish again and again, each time cut at the next checkpoint, until one gets through."""
    bench, at, was_cut = Bench(file), 0, True
    async with bench.bus.running():
        await bench.prepare()
        while was_cut:
            at += 1
            was_cut = await cut(bench.publish(at), at)
            await bench.publish(1_000 + at)
            rows = await bench.until((1_000 + at, "c"))
            parts = [part for number, part in rows if number == at]
            assert parts in ([], ["order", "a", "b", "c"]), f"cut at checkpoint {at}"
        assert parts
        assert at >= 5
    assert set(bench.attempts) == {1}


async def test_cancelled_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    """A publish whose scope is cancelled, at whatever checkpoint, has all of its messages handled or none."""
    await publishes(tmp_path / "a.db", cut_by_scope)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_transaction_of_a_cancelled_task_is_all_or_nothing(tmp_path: Path) -> None:
    """A publish whose task is cancelled, at whatever checkpoint, has all of its messages handled or none."""
    await publishes(tmp_path / "a.db", cut_by_task)


async def test_cancelled_lifetime_counts_no_failure(tmp_path: Path) -> None:
    """A handler that is cut with its process, at whatever checkpoint, has its effect once and no failure counted."""
    bench, at, cut = Bench(tmp_path / "a.db"), 0, 1
    while cut:
        at, cut = at + 1, 0
        with anyio.CancelScope() as scope:

            def end(scope: anyio.CancelScope = scope) -> None:
                nonlocal cut
                cut += 1
                worker = bench.bus.engine.worker
                assert worker is not None
                worker.cut()
                scope.cancel()

            async def during(event: Step, at: int = at) -> None:
                await watched(some(bench), at if event.round == at else -1, end)

            bench.during = during
            async with bench.bus.running():
                await bench.prepare()
                await bench.bus.publish(Step(round=at, part="x"), atomic=False)
                await bench.until((at, "x"))
        bench.during = None
        async with bench.bus.running():
            rows = await bench.until((at, "x"))
        assert rows.count((at, "x")) == 1
    assert at > 3
    assert set(bench.attempts) == {1}


async def some(bench: Bench) -> None:
    """Be a handler's work: a turn of the loop, a statement, another message."""
    await checkpoint()
    async with bench.bus.transaction() as tx:
        await tx.session.fetchall("SELECT 1")
    await checkpoint()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_handler_cancelled_by_a_stranger_counts_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler whose task a stranger cancels, at whatever checkpoint, comes again and has its effect once."""
    monkeypatch.setattr(channel, "STRAY", 0.01)
    bench, at, cut = Bench(tmp_path / "a.db"), 0, 1
    async with bench.bus.running():
        await bench.prepare()

        def end() -> None:
            nonlocal cut
            cut += 1
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

        async def during(event: Step) -> None:
            await watched(some(bench), -1 if cut else at, end)

        while cut:
            at, cut = at + 1, 0

            bench.during = during
            await bench.bus.publish(Step(round=at, part="x"), atomic=False)
            rows = await bench.until((at, "x"))
            assert rows.count((at, "x")) == 1
    assert at > 3
    assert set(bench.attempts) == {1}
