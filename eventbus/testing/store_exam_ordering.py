"""Ask a store about order: one key at a time, in the order of writing, and nobody waits for another key."""

import anyio
from anyio.lowlevel import checkpoint

from eventbus.store import DeadFilter, Entry, Interest, NewEntry, Recipient, Settlement
from eventbus.testing.store_desk import LEASE, Check, Desk, H, O, checks, equal, ids, require

__all__ = ("CHECKS",)


async def keyed(desk: Desk, **keys: str | None) -> None:
    """Publish messages for the ordered handler: id=key."""
    for id_, key in keys.items():
        await desk.publish(id_, type="o", key=key)


async def one_at_a_time(desk: Desk) -> None:
    """Bring of each key only the first; the next follows when it is done."""
    await keyed(desk, a1="a", b1="b", a2="a", a3="a", b2="b")
    order: list[str] = []
    while entries := await desk.take(O):
        require(len({one.lane for one in entries}) == len(entries), f"two of one key at a time: {ids(entries)}")
        for one in entries:
            order.append(one.message_id)
            await desk.settle(one)
    equal([one for one in order if one[0] == "a"], ["a1", "a2", "a3"], "order of a")
    equal([one for one in order if one[0] == "b"], ["b1", "b2"], "order of b")


async def nobody_overtakes(desk: Desk) -> None:
    """Hold the next of a key back whatever becomes of the first, but done."""
    await keyed(desk, first="a", second="a", other="b")
    first, other = await desk.take(O)
    await desk.settle(other)
    for outcome in ("again", "release"):
        await desk.settle(first, outcome, after=50.0)
        equal(await desk.ids(O), [], f"due while the first waits after {outcome}")
        desk.clock.advance(50.0)
        first = await desk.one(O)
        equal(first.message_id, "first", f"claimed after {outcome}")
    desk.clock.advance(LEASE)
    lapsed = await desk.one(O)
    equal((lapsed.message_id, lapsed.claims), ("first", 4), "claimed after the lapse")
    require(not await desk.settle(first), "the late word was heard")
    equal(await desk.ids(O), [], "due after a late word")
    require(await desk.settle(lapsed), "the claim holds")
    equal(await desk.ids(O), ["second"], "then")


async def dead_and_on(desk: Desk) -> None:
    """Go on with a key after a death."""
    await keyed(desk, first="a", second="a")
    await desk.settle(await desk.one(O), "dead")
    equal(await desk.ids(O), ["second"], "due")


async def dead_and_blocked(desk: Desk) -> None:
    """Keep a key, and only that key, behind a death that blocks, until it is replayed or discarded."""
    await keyed(desk, first="a", second="a", third="a", other="b")
    first, other = await desk.take(O)
    await desk.settle(first, "dead", blocks=True)
    await desk.settle(other)
    equal(await desk.ids(O), [], "due while blocked")
    equal(await desk.store.due([O.name]), {}, "due() while blocked")
    await desk.store.replay(DeadFilter())
    again = await desk.one(O)
    equal((again.message_id, again.failures), ("first", 0), "due after the replay")
    await desk.settle(again)
    second = await desk.one(O)
    await desk.settle(second, "dead", blocks=True)
    equal(await desk.ids(O), [], "due while blocked again")
    equal(await desk.store.discard(DeadFilter()), 1, "discarded")
    equal(await desk.ids(O), ["third"], "due after the discard")


async def replayed_behind(desk: Desk) -> None:
    """Bring one that died without blocking back without disturbing its key."""
    await keyed(desk, first="a", second="a", third="a")
    await desk.settle(await desk.one(O), "dead")
    second = await desk.one(O)
    await desk.store.replay(DeadFilter())
    equal(await desk.ids(O), ["first"], "due beside the one that runs")
    await desk.settle(second)
    equal(await desk.ids(O), ["third"], "due then")


async def without_key(desk: Desk) -> None:
    """Let messages without a key, or with an empty one, wait for nobody."""
    await keyed(desk, a1="a", n1=None, a2="a", n2=None, e1="", e2="")
    equal(sorted(await desk.ids(O)), ["a1", "e1", "e2", "n1", "n2"], "due")


async def delayed_takes_no_lane(desk: Desk) -> None:
    """Let a delayed message hold up nobody of its key, and wait for nobody."""
    await desk.publish("later", type="o", key="a", delay=10.0)
    await keyed(desk, now="a", behind="a")
    now = await desk.one(O)
    equal(now.message_id, "now", "due at once")
    desk.clock.advance(10.0)
    later = await desk.one(O)
    equal((later.message_id, later.lane), ("later", None), "due later")
    await desk.settle(now)
    equal(await desk.ids(O), ["behind"], "due at the end")


async def plain_beside_ordered(desk: Desk) -> None:
    """Give a message a lane for its ordered handlers only."""
    await desk.store.announce([Interest(H.name, "o")])
    await keyed(desk, a1="a", a2="a")
    equal([one.lane for one in await desk.take(H)], [None, None], "lanes of the plain handler")
    equal([one.lane for one in await desk.take(O)], ["a"], "lanes of the ordered handler")


async def ordered_no_more(desk: Desk) -> None:
    """Give a handler that is not ordered any more all it has, lanes or not."""
    await keyed(desk, a1="a", a2="a", n1=None)
    await desk.store.announce([Interest(O.name, "o")])
    await keyed(desk, a3="a")
    plain = Recipient(O.name)
    require((await desk.store.due([O.name]))[O.name] <= 0, "due() does not know")
    entries = await desk.take(plain)
    equal(sorted(ids(entries)), ["a1", "a2", "a3", "n1"], "due")
    for one in entries:
        require(await desk.settle(one), "a claim does not hold")
    equal(await desk.ids(plain), [], "due at the end")


async def fair_to_all_keys(desk: Desk) -> None:
    """Get round to every key for a claimer that takes one at a time."""
    for n in range(20):
        await keyed(desk, **{f"{key}{n}": key for key in "abc"})
    seen: list[str] = []
    cursor = ""
    for _ in range(6):
        claimed = await desk.store.claim(O, owner="w", limit=1, lease=LEASE, cursor=cursor)
        cursor = claimed.cursor
        require(claimed.entries or cursor, "the store says that nothing is due, and it is not so")
        for one in claimed.entries:
            seen.append(one.lane or "")
            await desk.settle(one)
    equal(sorted(set(seen)), ["a", "b", "c"], "keys served by six claims")


async def many_keys(desk: Desk) -> None:
    """Find keys behind many that wait, and say when there is nothing more."""
    await desk.store.add(
        [NewEntry(message_id=f"{n}-{m}", type="o", body=b"", key=f"k{n:04}") for n in range(700) for m in range(2)]
    )
    first = await desk.take(O, limit=690)
    equal(len({one.lane for one in first}), 690, "keys in hand")
    rest = await desk.take(O)
    equal(len(rest), 10, "keys due behind 690 that wait")
    equal(await desk.ids(O), [], "due when all wait")
    for one in rest:
        await desk.settle(one)
    equal(sorted(await desk.ids(O)), sorted(f"{one.message_id[:-1]}1" for one in rest), "the next of those")


async def when_keys_are_due(desk: Desk) -> None:
    """Call nothing due that waits for another of its key."""
    await keyed(desk, a1="a", a2="a", b1="b")
    a1, b1 = await desk.take(O)
    equal(await desk.store.due([O.name]), {O.name: LEASE}, "due() while the first runs")
    await desk.settle(a1, "again", after=7.0)
    equal(await desk.store.due([O.name]), {O.name: 7.0}, "due() while the first waits")
    desk.clock.advance(7.0)
    await desk.settle(await desk.one(O))
    require((await desk.store.due([O.name]))[O.name] <= 0, "the second is due and due() says it is not")
    await desk.settle(b1)


async def claimers_keep_order(desk: Desk) -> None:
    """Claim nothing of a key before all before it is done, with many claimers at once."""
    count, lanes = 120, 7
    await desk.store.add(
        [NewEntry(message_id=f"{n:03}", type="o", body=b"", key=f"k{n % lanes}") for n in range(count)]
    )
    running: set[str | None] = set()
    done: dict[str | None, list[str]] = {}

    async def work(owner: str) -> None:
        cursor = ""
        while sum(map(len, done.values())) < count:
            claimed = await desk.store.claim(O, owner=owner, limit=3, lease=LEASE, cursor=cursor)
            cursor = claimed.cursor
            for one in claimed.entries:
                require(one.lane not in running, f"two of {one.lane} at a time")
                running.add(one.lane)
            for one in claimed.entries:
                await checkpoint()
                done.setdefault(one.lane, []).append(one.message_id)
                running.discard(one.lane)
                await _finish(desk, one)

    async with anyio.create_task_group() as group:
        for n in range(6):
            group.start_soon(work, f"w{n}")
    for lane, order in done.items():
        equal(order, sorted(order), f"order of {lane}")


async def _finish(desk: Desk, entry: Entry) -> None:
    require(not await desk.store.settle([Settlement(entry.seq, entry.claims, "done")]), "a claim was lost")


CHECKS: tuple[Check, ...] = checks(
    one_at_a_time,
    nobody_overtakes,
    dead_and_on,
    dead_and_blocked,
    replayed_behind,
    without_key,
    delayed_takes_no_lane,
    plain_beside_ordered,
    ordered_no_more,
    fair_to_all_keys,
    many_keys,
    when_keys_are_due,
    claimers_keep_order,
)
