"""Prove that the memory store keeps what every store promises, and what only it promises."""

import pytest

from eventbus.errors import StoreError, StoreFullError, TransactionClosedError
from eventbus.limits import Limits
from eventbus.store import DeadFilter, Interest, NewEntry, Recipient, Settlement, Transaction, connect
from eventbus.stores.memory import MemorySession, MemoryStore
from eventbus.testing.store_exam import CHECKS, LIMITS, Check, HandClock, examine

H = Recipient("svc/h")
O = Recipient("svc/o", ordered=True)  # noqa: E741 - stands beside H


def new(id: str, *, key: str | None = None, to: Recipient = H) -> NewEntry:
    """Return a message for one recipient."""
    return NewEntry(message_id=id, type="t", body=b"body", key=key, recipients=(to,))


@pytest.mark.parametrize("check", CHECKS, ids=str)
async def test_exam(check: Check) -> None:
    """It passes the exam of every store."""
    await examine(check, lambda: MemoryStore(limits=LIMITS))


def test_urls() -> None:
    """memory:// names it, and takes nothing behind it."""
    assert isinstance(connect("memory://"), MemoryStore)
    assert not connect("memory://").shared
    for url in ("memory://host", "memory:///path", "memory://?a=b", "memory://#a"):
        with pytest.raises(ValueError, match="nothing behind it"):
            connect(url)


async def test_session() -> None:
    """A transaction gives a session without any data of its own, as long as it lasts."""
    async with MemoryStore() as store:
        async with store.begin() as unit:
            transaction: Transaction[MemorySession] = Transaction(unit)
            assert isinstance(transaction.session, MemorySession)
            transaction.closed = True
        with pytest.raises(TransactionClosedError):
            _ = transaction.session


async def test_capacity_forgets_what_is_done_before_it_refuses() -> None:
    """At its ceiling the memory of done entries goes, oldest first; what waits or is dead never does."""
    async with MemoryStore(capacity=4) as store:
        await store.add([new("done1"), new("done2"), new("dead"), new("waiting")])
        entries = {one.message_id: one for one in (await store.claim(H, owner="w", limit=3, lease=30.0)).entries}
        for name, one in entries.items():
            await store.settle([Settlement(one.seq, one.claims, "dead" if name == "dead" else "done")])
        assert await store.add([new("done2")]) == frozenset()
        assert await store.add([new("a")]) == {H.name}
        assert await store.add([new("done1")]) == {H.name}
        with pytest.raises(StoreFullError, match="4 of 4"):
            await store.add([new("b")])
        with pytest.raises(StoreFullError):
            async with store.begin() as unit:
                await unit.add([new("c")])
        found = (await store.claim(H, owner="w", limit=9, lease=30.0)).entries
        assert ["waiting", "a", "done1"] == [one.message_id for one in found]
        assert ["dead"] == [one.message_id for one in await store.dead(DeadFilter())]


async def test_commit_whose_lease_was_taken_writes_nothing() -> None:
    """When an operator forgot the handler meanwhile, its transaction fails as a whole."""
    async with MemoryStore() as store:
        await store.add([new("m")])
        (entry,) = (await store.claim(H, owner="w", limit=1, lease=30.0)).entries
        with pytest.raises(StoreError, match="taken away"):
            async with store.begin() as unit:
                assert await unit.settle(Settlement(entry.seq, entry.claims, "done"))
                await unit.add([new("n")])
                await store.forget(H.name)
        assert [] == list((await store.claim(H, owner="w", limit=9, lease=30.0)).entries)


@pytest.mark.parametrize("recipient", [H, O], ids=["plain", "ordered"])
async def test_memory_does_not_grow_with_what_was(recipient: Recipient) -> None:
    """After many rounds nothing is kept but what was said to be kept."""
    clock = HandClock()
    store = MemoryStore(limits=Limits())
    store.bind(clock)
    async with store:
        await store.add([new("held", to=recipient)])
        (kept,) = (await store.claim(recipient, owner="w", limit=1, lease=10.0)).entries
        for n in range(300):
            await store.add([new(f"{n}-{m}", key=f"k{m % 3}", to=recipient) for m in range(10)])
            while entries := (await store.claim(recipient, owner="w", limit=5, lease=30.0)).entries:
                held = [(one.seq, one.claims) for one in entries]
                await store.extend(held, 60.0)
                await store.settle([Settlement(*one, "release") for one in held])
                again = (await store.claim(recipient, owner="w", limit=5, lease=30.0)).entries
                await store.settle([Settlement(one.seq, one.claims, "done") for one in again])
        assert len(store._boxes[recipient.name]._heap) <= 100
        await store.settle([Settlement(kept.seq, kept.claims, "done")])
        clock.advance(1_000.0)
        await store.sweep(retention=1.0, lease=30.0, batch=10_000)
    box = store._boxes[recipient.name]
    sizes = (store._rows, store._once, store._owned, store._over, box.rows, box.lanes)
    assert [0] * 6 == [len(one) for one in sizes]
    assert len(box._heap) <= 100


async def test_interest_in_nothing_is_nothing() -> None:
    """A type that was announced and forgotten again is wanted by nobody."""
    async with MemoryStore() as store:
        await store.announce([Interest(H.name, "t")])
        assert await store.forget(H.name) == 0
        assert await store.add([NewEntry(message_id="m", type="t", body=b"")]) == frozenset()


async def test_row_that_a_transaction_holds_is_settled_by_nobody_else() -> None:
    """While a handler's transaction has locked its row, a settlement beside it is refused, and the transaction wins."""
    async with MemoryStore() as store:
        await store.add([new("m")])
        (entry,) = (await store.claim(H, owner="w", limit=1, lease=30.0)).entries
        async with store.begin() as unit:
            assert await unit.lock(entry.seq, entry.claims)
            assert {entry.seq} == await store.settle([Settlement(entry.seq, entry.claims, "again")])
            assert await unit.settle(Settlement(entry.seq, entry.claims, "done"))
        assert {} == await store.due([H.name])
