"""Ask a store about claims: who gets what, for how long, and that a late word changes nothing."""

from typing import Any, Literal

import anyio

from eventbus.store import DeadFilter, Entry, NewEntry, Recipient, Settlement
from eventbus.testing.store_desk import LEASE, Check, Desk, H, O, checks, equal, ids, require

__all__ = ("CHECKS",)

PROMPT = 5.0
"""Seconds within which a claim that waits for nobody is back."""

OUTCOMES: tuple[Literal["done", "again", "release", "dead"], ...] = ("done", "again", "release", "dead")


async def what_a_claim_brings(desk: Desk) -> None:
    """Bring what was written, and how often it was claimed and failed."""
    await desk.publish("m")
    entry = await desk.one()
    wanted = Entry(entry.seq, 1, 0, "m", H.name, "t", None, 0, b"m")
    equal(entry, wanted, "the claim brought")


async def oldest_first(desk: Desk) -> None:
    """Bring no more than asked for, and first what has been due for longest."""
    for id_ in ("a", "b", "c", "d"):
        await desk.publish(id_)
        desk.clock.advance(1.0)
    equal(await desk.ids(Recipient("svc/nobody")), [], "for somebody else")
    equal(ids(await desk.take(limit=3)), ["a", "b", "c"], "first")
    equal(await desk.ids(), ["d"], "then")


async def leased(desk: Desk) -> None:
    """Keep a claimed entry from others until its lease has lapsed, and then give it anew."""
    await desk.publish("m")
    first = await desk.one()
    desk.clock.advance(LEASE - 0.01)
    equal(await desk.ids(), [], "due within the lease")
    desk.clock.advance(0.01)
    second = await desk.one()
    equal((second.seq, second.claims, second.failures, second.crashes), (first.seq, 2, 0, 1), "after it")


async def extended(desk: Desk) -> None:
    """Lengthen a lease from now."""
    await desk.publish("a", "b")
    a, b = await desk.take()
    desk.clock.advance(20.0)
    equal(await desk.store.extend([(a.seq, a.claims), (b.seq, b.claims + 1)], LEASE), {b.seq}, "lost")
    desk.clock.advance(LEASE - 1)
    equal(await desk.ids(), ["b"], "due")
    desk.clock.advance(1.0)
    equal(await desk.ids(), ["a"], "due at the end")


async def late_words(desk: Desk) -> None:
    """Ignore every word of a claimer whose lease was taken."""
    for outcome in OUTCOMES:
        await desk.publish(outcome)
        late = await desk.one()
        desk.clock.advance(LEASE)
        kept = await desk.one()
        require(not await desk.settle(late, outcome), f"{outcome} of a lost lease was written")
        equal(await desk.store.extend([(late.seq, late.claims)], 10 * LEASE), {late.seq}, "extended, though lost")
        equal(await desk.ids(), [], f"due after a late {outcome}")
        require(await desk.settle(kept, "again"), f"a late {outcome} took the other's claim")
        (entry,) = await desk.take()
        equal((entry.claims, entry.failures), (3, 1), f"claims and failures after a late {outcome}")
        require(await desk.settle(entry), f"a late {outcome} took the third claim")
    equal(list(await desk.store.dead(DeadFilter())), [], "dead")


async def said_once(desk: Desk) -> None:
    """Take one word for a claim: a second is late, also before anybody else claims."""
    for first in OUTCOMES:
        for second in (*OUTCOMES, "extend", "lock"):
            await desk.publish(f"{first}, {second}")
            (entry,) = await desk.take()
            require(await desk.settle(entry, first), f"{first} was not written")
            if second == "extend":
                lost = bool(await desk.store.extend([(entry.seq, entry.claims)], LEASE))
            elif second == "lock":
                async with desk.store.begin() as unit:
                    lost = not await unit.lock(entry.seq, entry.claims)
            else:
                lost = not await desk.settle(entry, second)
            require(lost, f"{second} was written after {first}")
            for left in await desk.take():
                equal(left.failures, int(first == "again"), f"failures after {first}, {second}")
                await desk.settle(left)


async def a_late_word_in_time(desk: Desk) -> None:
    """Hear a lapsed lease as long as nobody has taken it."""
    await desk.publish("m")
    entry = await desk.one()
    desk.clock.advance(10 * LEASE)
    require(await desk.settle(entry), "a lapsed lease that nobody took is lost")
    equal(await desk.ids(), [], "due")


async def unheard_of(desk: Desk) -> None:
    """Ignore words about what was never claimed, or never was."""
    await desk.publish("m")
    entry = await desk.one()
    await desk.settle(entry, "release")
    for seq, claims in ((entry.seq, 0), (entry.seq, 7), (entry.seq + 1_000, 1), (-1, 1)):
        for outcome in OUTCOMES:
            equal(await desk.store.settle([Settlement(seq, claims, outcome)]), {seq}, f"{outcome} of {seq}, {claims}")
        equal(await desk.store.extend([(seq, claims)], LEASE), {seq}, "extended")
    equal(await desk.ids(), ["m"], "due")


async def done(desk: Desk) -> None:
    """Never bring back what is done."""
    await desk.publish("m")
    require(await desk.settle(await desk.one()), "the claim does not hold")
    desk.clock.advance(100 * LEASE)
    equal(await desk.ids(), [], "due")


async def again(desk: Desk) -> None:
    """Count a failure, and wait as long as was said."""
    await desk.publish("m")
    for failures in range(3):
        entry = await desk.one()
        equal((entry.claims, entry.failures, entry.crashes), (failures + 1, failures, 0), "claims, failures, crashes")
        await desk.settle(entry, "again", after=2.5)
        desk.clock.advance(2.49)
        equal(await desk.ids(), [], "due before its time")
        desk.clock.advance(0.01)


async def released(desk: Desk) -> None:
    """Count neither failure nor crash for what is released, and bring it when it was said."""
    await desk.publish("m")
    await desk.settle(await desk.one(), "release")
    entry = await desk.one()
    equal((entry.claims, entry.failures, entry.crashes), (2, 0, 0), "claims, failures, crashes")
    await desk.settle(entry, "release", after=60.0)
    desk.clock.advance(59.0)
    equal(await desk.ids(), [], "due before its time")
    desk.clock.advance(1.0)
    equal((await desk.one()).failures, 0, "failures")


async def crashes(desk: Desk) -> None:
    """Count claims in a row that ended without a word; any word begins anew."""
    await desk.publish("m")
    for expected in (0, 1, 2, 3):
        entry = await desk.one()
        equal(entry.crashes, expected, "crashes")
        desk.clock.advance(LEASE)
    entry = await desk.one()
    await desk.store.extend([(entry.seq, entry.claims)], LEASE)
    await desk.settle(entry, "again")
    equal((await desk.one()).crashes, 0, "crashes after a word")
    desk.clock.advance(LEASE)
    equal((await desk.one()).crashes, 1, "crashes after the next")


async def delayed(desk: Desk) -> None:
    """Bring a delayed message when it is due, not before."""
    await desk.publish("later", delay=3600.0)
    await desk.publish("now")
    equal(await desk.ids(), ["now"], "due at once")
    desk.clock.advance(3599.99)
    equal([one for one in await desk.ids() if one == "later"], [], "due before its time")
    desk.clock.advance(0.01)
    equal([one for one in await desk.ids() if one == "later"], ["later"], "due at its time")


async def one_lost_in_a_batch(desk: Desk) -> None:
    """Name what is lost in a batch of settlements, and write all others."""
    await desk.publish("lost", "done", "again", "release", "dead", "blocking")
    entries = {one.message_id: one for one in await desk.take()}
    lost = entries.pop("lost")
    batch = [Settlement(lost.seq, lost.claims + 1, "done")]
    for name, one in entries.items():
        outcome: Any = "dead" if name == "blocking" else name
        batch.append(Settlement(one.seq, one.claims, outcome, 5.0, "boom", name == "blocking"))
    equal(await desk.store.settle(batch), {lost.seq}, "lost")
    desk.clock.advance(5.0)
    equal(sorted(await desk.ids()), ["again", "release"], "due")
    equal({one.message_id for one in await desk.store.dead(DeadFilter())}, {"dead", "blocking"}, "dead")


async def claimers_race(desk: Desk) -> None:
    """Give each entry to one of many claimers at once, and everything to all of them together."""
    await desk.store.add([NewEntry(message_id=f"m{n}", type="t", body=b"") for n in range(200)])
    got: list[Entry] = []

    async def claim(owner: str) -> None:
        while entries := (await desk.store.claim(H, owner=owner, limit=7, lease=LEASE)).entries:
            got.extend(entries)

    async with anyio.create_task_group() as group:
        for n in range(8):
            group.start_soon(claim, f"w{n}")
    equal(len({entry.seq for entry in got}), 200, "different entries claimed")
    equal(len(got), 200, "claims")


async def held_rows(desk: Desk) -> None:
    """Let a claim pass by an entry whose row a transaction holds, at once, and bring the others.

    Not asked of a store whose transactions keep every other writer out: there a claim waits, and ``exclusive`` says so.
    """
    if desk.store.exclusive:
        return
    for number, (recipient, type_) in enumerate(((H, "t"), (O, "o"), (Recipient(O.name), "o"))):
        await desk.publish(f"held {number}", type=type_, key="a")
        held = await desk.one(recipient)
        desk.clock.advance(LEASE)
        await desk.publish(f"free {number}", type=type_, key="b")
        got: list[Entry] = []
        claimed = anyio.Event()

        async def claim(recipient: Recipient, got: list[Entry], claimed: anyio.Event) -> None:
            got += await desk.take(recipient)
            claimed.set()

        async with anyio.create_task_group() as group, desk.store.begin() as unit:
            require(await unit.lock(held.seq, held.claims), "the lapsed lease that nobody took is lost")
            group.start_soon(claim, recipient, got, claimed)
            with anyio.move_on_after(PROMPT):
                await claimed.wait()
            require(claimed.is_set(), f"a claim of {recipient} waited for a row that was held")
        equal(ids(got), [f"free {number}"], "beside a row that was held")
        for entry in (held, *got):
            await desk.settle(entry)


async def due(desk: Desk) -> None:
    """Tell when each recipient's first entry can be claimed, and nothing of one without any."""
    names = [H.name, "svc/nobody"]
    equal(await desk.store.due(names), {}, "with nothing")
    await desk.publish("later", delay=100.0)
    equal(await desk.store.due(names), {H.name: 100.0}, "with a delayed one")
    await desk.publish("now")
    desk.clock.advance(2.0)
    require((await desk.store.due(names))[H.name] <= 0, "one is due and due() says it is not")
    (entry,) = await desk.take()
    equal(await desk.store.due(names), {H.name: LEASE}, "with a lease")
    await desk.settle(entry)
    equal(await desk.store.due(names), {H.name: 98.0}, "with that done")
    await desk.store.forget(H.name)
    equal(await desk.store.due(names), {}, "with all dead")


CHECKS: tuple[Check, ...] = checks(
    what_a_claim_brings,
    oldest_first,
    leased,
    extended,
    late_words,
    said_once,
    a_late_word_in_time,
    unheard_of,
    done,
    again,
    released,
    crashes,
    delayed,
    one_lost_in_a_batch,
    claimers_race,
    held_rows,
    due,
)
