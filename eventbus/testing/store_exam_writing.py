"""Ask a store what becomes of what is written: rows, duplicates, transactions, savepoints."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from eventbus.errors import EventBusError, TransactionClosedError
from eventbus.store import DeadFilter, Interest, NewEntry, Recipient, Settlement, Unit
from eventbus.testing.store_desk import LEASE, Check, Desk, H, O, checks, equal, require

__all__ = ("CHECKS",)

OTHER = Recipient("svc/other")
AWAY = Recipient("svc>broker", ordered=True)


class _UndoError(Exception):
    """Be the reason why a block of the exam is rolled back."""


@asynccontextmanager
async def undone() -> AsyncGenerator[None]:
    """Expect the block to be left by its own error."""
    try:
        yield
    except _UndoError:
        return
    raise AssertionError("an exception in the block was swallowed")


def new(id: str, *, type: str = "t", subscribers: bool = True, to: tuple[Recipient, ...] = ()) -> NewEntry:
    """Return a message to be written."""
    return NewEntry(message_id=id, type=type, body=id.encode(), subscribers=subscribers, recipients=to)


async def one_row_each(desk: Desk) -> None:
    """Give a message one entry for each announced handler of its type and each named recipient."""
    await desk.store.announce([Interest(OTHER.name, "t")])
    written = await desk.store.add([new("m", to=(AWAY,)), new("n", subscribers=False, to=(AWAY,))])
    equal(written, {H.name, OTHER.name, AWAY.name}, "add returns the recipients written to")
    equal(await desk.ids(), ["m"], "the handler has")
    equal(await desk.ids(OTHER), ["m"], "the other handler has")
    equal(await desk.ids(AWAY), ["m", "n"], "the named recipient has")
    equal(await desk.ids(O), [], "a handler of another type has")


async def nobody(desk: Desk) -> None:
    """Leave no entry of what nobody wants, also not for who is announced later."""
    equal(await desk.store.add([new("m", type="unknown")]), frozenset(), "written to")
    await desk.store.announce([Interest("svc/late", "unknown")])
    equal(await desk.ids(Recipient("svc/late")), [], "the late handler has")


async def once(desk: Desk) -> None:
    """Take an id once per recipient, whatever became of its entry."""
    await desk.publish("leased", "done", "dead", "discarded")
    outcomes = {"done": "done", "dead": "dead", "discarded": "dead"}
    for entry in await desk.take():
        if entry.message_id in outcomes:
            await desk.settle(entry, outcomes[entry.message_id])
    dead = {one.message_id: one.id for one in await desk.store.dead(DeadFilter())}
    await desk.store.discard(DeadFilter(ids=(dead["discarded"],)))
    await desk.publish("waiting")
    for id_ in ("waiting", "leased", "done", "dead", "discarded"):
        equal(await desk.store.add([new(id_)]), frozenset(), f"written when the id is {id_}")
    equal(await desk.store.add([new("done", to=(AWAY,))]), {AWAY.name}, "written to somebody new")
    equal(await desk.store.add([new("twice"), new("twice")]), {H.name}, "written twice in one call")
    equal(await desk.ids(), ["waiting", "twice"], "due")
    desk.clock.advance(LEASE + 1)
    equal(sorted(await desk.ids()), ["leased", "twice", "waiting"], "due after the leases")


async def exact_texts(desk: Desk) -> None:
    """Keep ids, keys, types and recipients exactly: case, blanks at the end and every script count."""
    texts = ["a", "A", "a ", "ä", "a\u0308", "日本", "🎈", "%", "_", "'", '"', "a\\b", "x" * 150]
    recipient = Recipient("svc/Ünïcode 🎈", ordered=True)
    for text in texts:
        await desk.store.announce([Interest(recipient.name, f"type {text}", ordered=True)])
        await desk.publish(text, key=f"{text} key", type=f"type {text}")
    found = [(one.message_id, one.lane, one.type, one.recipient) for one in await desk.take(recipient)]
    equal(sorted(found), sorted((text, f"{text} key", f"type {text}", recipient.name) for text in texts), "kept")


async def exact_bodies(desk: Desk) -> None:
    """Keep a body as it is: no bytes, every value, a megabyte."""
    bodies = [b"", bytes(range(256)), b"\xff" * 1_048_576]
    await desk.store.add([NewEntry(message_id=str(n), type="t", body=body) for n, body in enumerate(bodies)])
    require([one.body for one in await desk.take()] == bodies, "a body came back changed")


async def nothing_to_do(desk: Desk) -> None:
    """Take empty batches everywhere."""
    store = desk.store
    await desk.publish("m")
    equal(await store.add([]), frozenset(), "add")
    equal(await store.settle([]), frozenset(), "settle")
    equal(await store.extend([], LEASE), frozenset(), "extend")
    await store.announce([])
    equal(await store.due([]), {}, "due")
    equal(list((await store.claim(H, owner="w", limit=0, lease=LEASE)).entries), [], "claim")
    async with store.begin() as unit:
        equal(await unit.add([]), frozenset(), "add in a transaction")
    async with store.begin():
        pass
    equal(await desk.ids(), ["m"], "due")


async def many_at_once(desk: Desk) -> None:
    """Take many messages in one call, and many calls at once, and lose none."""
    await desk.store.add([new(f"a{n}") for n in range(300)])
    async with anyio.create_task_group() as group:
        for n in range(64):
            group.start_soon(_publish_alone, desk, f"b{n}")
    found = await desk.take(limit=1_000)
    equal(len({one.message_id for one in found}), 364, "different messages due")
    equal(len(found), 364, "entries due")


async def _publish_alone(desk: Desk, id: str) -> None:
    async with desk.store.begin() as unit:
        await unit.add([new(id)])


async def committed(desk: Desk) -> None:
    """Keep what is added in a transaction that commits, and tell its recipients at once."""
    async with desk.store.begin() as unit:
        require(await unit.add([new("a", to=(AWAY,))]) >= {H.name, AWAY.name}, "the recipients are not all told")
        await unit.add([new("b"), new("a")])
    equal(await desk.ids(), ["a", "b"], "due after the commit")
    equal(await desk.ids(AWAY), ["a"], "due for the named recipient")


async def rolled_back(desk: Desk) -> None:
    """Take everything back on an exception, so that its ids are free again."""
    async with undone(), desk.store.begin() as unit:
        await unit.add([new("a")])
        raise _UndoError
    equal(await desk.ids(), [], "due after the rollback")
    equal(await desk.store.add([new("a")]), {H.name}, "written after the rollback")


async def savepoints(desk: Desk) -> None:
    """Take back what was added in a failing savepoint, also in those it held, and nothing else."""
    async with desk.store.begin() as unit:
        await unit.add([new("kept")])
        async with undone(), unit.savepoint():
            await unit.add([new("gone")])
            async with unit.savepoint():
                await unit.add([new("gone, though released")])
            raise _UndoError
        async with unit.savepoint():
            await unit.add([new("kept, inner")])
            async with undone(), unit.savepoint():
                await unit.add([new("gone, inner")])
                raise _UndoError
            await unit.add([new("kept, after")])
    equal(await desk.ids(), ["kept", "kept, inner", "kept, after"], "due")


async def savepoints_after_a_lock(desk: Desk) -> None:
    """Keep savepoints the same once the transaction has begun in the database."""
    await desk.publish("m")
    entry = await desk.one()
    async with desk.store.begin() as unit:
        async with undone(), unit.savepoint():
            await unit.add([new("gone, before")])
            require(await unit.lock(entry.seq, entry.claims), "the claim holds")
            await unit.add([new("gone, after")])
            raise _UndoError
        async with unit.savepoint():
            await unit.add([new("kept")])
            require(await unit.lock(entry.seq, entry.claims), "the claim still holds")
        require(await unit.settle(Settlement(entry.seq, entry.claims, "done")), "the claim can be settled")
    equal(await desk.ids(), ["kept"], "due")


async def rolled_back_over_savepoints(desk: Desk) -> None:
    """Take back with the transaction what its released savepoints held."""
    async with undone(), desk.store.begin() as unit:
        async with unit.savepoint():
            await unit.add([new("a")])
        raise _UndoError
    equal(await desk.ids(), [], "due")


async def over(desk: Desk) -> None:
    """Refuse everything in a transaction that is over."""
    units: list[Unit] = []
    async with desk.store.begin() as unit:
        units.append(unit)
    async with undone(), desk.store.begin() as unit:
        units.append(unit)
        await unit.add([new("a")])
        raise _UndoError
    for unit in units:
        for use in (_adds, _locks, _settles, _saves):
            refused = False
            try:
                await use(unit)
            except TransactionClosedError:
                refused = True
            equal(refused, True, f"a transaction that is over refuses {use.__name__}")
    equal(await desk.ids(), [], "due")


async def _adds(unit: Unit) -> None:
    await unit.add([new("late")])


async def _locks(unit: Unit) -> None:
    await unit.lock(1, 1)


async def _settles(unit: Unit) -> None:
    await unit.settle(Settlement(1, 1, "done"))


async def _saves(unit: Unit) -> None:
    async with unit.savepoint():
        pass


async def sessions(desk: Desk) -> None:
    """Hand out a session of a declared type, and refuse one that is somebody else's."""
    async with desk.store.begin() as unit:
        require(isinstance(unit.session, desk.store.sessions), f"{unit.session!r} is of no declared type")
    try:
        async with desk.store.begin(object()):
            pass
    except (TypeError, ValueError, EventBusError):
        return
    raise AssertionError("a session of somebody else is joined")


async def done_with_effects(desk: Desk) -> None:
    """Commit a settlement with what is added in its transaction, or lose it with that."""
    await desk.publish("m")
    entry = await desk.one()
    done = Settlement(entry.seq, entry.claims, "done")
    async with undone(), desk.store.begin() as unit:
        require(await unit.lock(entry.seq, entry.claims), "the claim holds")
        require(await unit.settle(done), "the claim can be settled")
        await unit.add([new("gone")])
        raise _UndoError
    equal(await desk.store.due([H.name]), {H.name: LEASE}, "the lease goes on after the rollback")
    async with desk.store.begin() as unit:
        require(await unit.lock(entry.seq, entry.claims), "the claim holds again")
        await unit.add([new("kept")])
        require(await unit.settle(done), "the claim can be settled again")
        require(not await unit.settle(done), "a claim was settled twice in one transaction")
    equal(await desk.ids(), ["kept"], "due")
    desk.clock.advance(LEASE + 1)
    equal(await desk.ids(), ["kept"], "due after the lease")


async def lost_in_a_transaction(desk: Desk) -> None:
    """Tell of a lost lease at lock and at settle."""
    await desk.publish("m")
    lost = await desk.one()
    desk.clock.advance(LEASE + 1)
    kept = await desk.one()
    async with desk.store.begin() as unit:
        require(not await unit.lock(lost.seq, lost.claims), "a lost lease was locked")
    async with desk.store.begin() as unit:
        require(not await unit.settle(Settlement(lost.seq, lost.claims, "done")), "a lost lease was settled")
    require(await desk.settle(kept), "the claim of the other does not hold any more")


async def locked(desk: Desk) -> None:
    """Keep from others what a transaction has locked, though its lease lapses meanwhile."""
    await desk.publish("m")
    entry = await desk.one()
    stolen: Sequence[object] = ()
    async with anyio.create_task_group() as group, desk.store.begin() as unit:
        require(await unit.lock(entry.seq, entry.claims), "the claim holds")
        desk.clock.advance(LEASE + 1)

        async def steal() -> None:
            nonlocal stolen
            stolen = (await desk.store.claim(H, owner="thief", limit=1, lease=LEASE)).entries

        group.start_soon(steal)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        require(await unit.settle(Settlement(entry.seq, entry.claims, "done")), "the lock did not keep the claim")
    equal(list(stolen), [], "claimed while locked")


async def opened_again(desk: Desk) -> None:
    """Close, twice, and open again with what was committed."""
    await desk.publish("m")
    entry = await desk.one()
    await desk.store.__aexit__(None, None, None)
    await desk.store.__aexit__(None, None, None)
    await desk.store.__aenter__()
    await desk.publish("n")
    equal(await desk.ids(), ["n"], "due")
    require(await desk.settle(entry), "a claim from before does not hold any more")


async def announced_anew(desk: Desk) -> None:
    """Count what was announced last: who becomes ordered has lanes from then on."""
    await desk.publish("a", key="k")
    await desk.store.announce([Interest(H.name, "t", ordered=True)])
    await desk.publish("b", key="k")
    lanes = {one.message_id: one.lane for one in await desk.take(Recipient(H.name, ordered=True))}
    equal(lanes, {"a": None, "b": "k"}, "lanes")


CHECKS: tuple[Check, ...] = checks(
    one_row_each,
    nobody,
    once,
    exact_texts,
    exact_bodies,
    nothing_to_do,
    many_at_once,
    committed,
    rolled_back,
    savepoints,
    savepoints_after_a_lock,
    rolled_back_over_savepoints,
    over,
    sessions,
    done_with_effects,
    lost_in_a_transaction,
    locked,
    opened_again,
    announced_anew,
)
