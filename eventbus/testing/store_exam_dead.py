"""Ask a store about the dead, and about its housekeeping: replay, discard, names, silence, pruning, clocks."""

from datetime import UTC, datetime

import anyio

from eventbus.store import DeadFilter, Interest, Recipient
from eventbus.testing.store_desk import DAY, LEASE, LIMITS, Check, Desk, H, O, checks, equal, ids, require

__all__ = ("CHECKS",)

NEW = Recipient("svc/new name")


async def what_is_shown(desk: Desk) -> None:
    """Show of a dead entry which message, whose, after how many failures, why and when."""
    await desk.publish("m")
    await desk.settle(await desk.one(), "again")
    died = datetime.fromtimestamp(desk.clock.now(), UTC)
    await desk.settle(await desk.one(), "dead")
    (dead,) = await desk.store.dead(DeadFilter())
    equal((dead.message_id, dead.message, dead.handler), ("m", "t", H.name), "which and whose")
    equal((dead.failures, dead.error, dead.body), (2, "boom", b"m"), "failures, error, body")
    equal(dead.time, died, "time")


async def chosen(desk: Desk) -> None:
    """Choose dead entries by id, message, handler, time and a part of the error, literally."""
    dead = await desk.kill("a", "b", "c")
    await desk.publish("o", type="o")
    await desk.settle(await desk.one(O), "dead")

    async def found(by: DeadFilter) -> list[str]:
        return [one.message_id for one in await desk.store.dead(by)]

    equal(await found(DeadFilter()), ["a", "b", "c", "o"], "all, those first that died first")
    equal(await found(DeadFilter(ids=(dead[2].id, dead[0].id))), ["a", "c"], "by id")
    equal(await found(DeadFilter(ids=())), [], "by no id")
    equal(await found(DeadFilter(ids=("no id of ours", "", "1-2-3", "9" * 40))), [], "by ids of something else")
    equal(await found(DeadFilter(message="o")), ["o"], "by message")
    equal(await found(DeadFilter(handler=O.name)), ["o"], "by handler")
    equal(await found(DeadFilter(since=dead[1].time)), ["b", "c", "o"], "by time")
    equal(await found(DeadFilter(error="oo")), ["a", "b", "c", "o"], "by error")
    equal(await found(DeadFilter(error="b%m")) + await found(DeadFilter(error="_")), [], "by a pattern")
    equal(await found(DeadFilter(message="t", since=dead[1].time, limit=1)), ["b"], "by several, limited")


async def in_pages(desk: Desk) -> None:
    """Show each dead entry once over pages, also when the entries died in another order."""
    await desk.publish(*(f"m{n}" for n in range(7)))
    died: list[str] = []
    for n, one in enumerate(reversed(await desk.take())):
        await desk.settle(one, "dead")
        died.append(one.message_id)
        desk.clock.advance(float(n % 2))
    seen: list[str] = []
    after: str | None = None
    while page := await desk.store.dead(DeadFilter(limit=2, after=after)):
        seen += [one.message_id for one in page]
        after = page[-1].id
    equal(sorted(seen), sorted(died), "seen")
    equal(len(await desk.store.dead(DeadFilter(limit=None))), 7, "without limit")


async def replayed(desk: Desk) -> None:
    """Make replayed entries due with their failures forgotten, and find nothing the second time."""
    await desk.publish("m")
    late = await desk.one()
    desk.clock.advance(LEASE)
    entry = await desk.one()
    await desk.settle(entry, "dead")
    await desk.kill("n")
    (dead, _) = await desk.store.dead(DeadFilter())
    equal(dict(await desk.store.replay(DeadFilter(ids=(dead.id,)))), {H.name: 1}, "replayed")
    equal(dict(await desk.store.replay(DeadFilter(ids=(dead.id,)))), {}, "replayed twice")
    require(not await desk.settle(late), "a claim from before the death was heard")
    require(not await desk.settle(entry), "the claim that died was heard")
    again = await desk.one()
    equal((again.message_id, again.failures, again.crashes, again.body), ("m", 0, 0, b"m"), "after the replay")
    equal(again.claims, entry.claims + 2, "claims, of which the replay is one")
    desk.clock.advance(LEASE)
    equal((await desk.one()).crashes, 1, "crashes after the next")


async def discarded(desk: Desk) -> None:
    """Forget what is discarded but for its id, and find nothing the second time."""
    dead = await desk.kill("a", "b")
    by = DeadFilter(ids=(dead[0].id,))
    equal(await desk.store.discard(by), 1, "discarded")
    equal(await desk.store.discard(by), 0, "discarded twice")
    equal(dict(await desk.store.replay(by)), {}, "replayed after that")
    equal([one.message_id for one in await desk.store.dead(DeadFilter())], ["b"], "still dead")
    await desk.publish("a")
    equal(await desk.ids(), [], "due after its id came again")


async def by_two_operators(desk: Desk) -> None:
    """Replay and discard each entry once when two operators do it at once."""
    await desk.kill(*(f"m{n}" for n in range(12)))
    replays: list[int] = []
    discards: list[int] = []

    async def replay() -> None:
        replays.append(sum((await desk.store.replay(DeadFilter(limit=6))).values()))

    async def discard() -> None:
        discards.append(await desk.store.discard(DeadFilter(limit=None)))

    async with anyio.create_task_group() as group:
        for job in (replay, discard, replay, discard):
            group.start_soon(job)
    due = await desk.take()
    equal(sum(replays), len(due), "replayed, against due")
    equal(sum(replays) + sum(discards), 12, "replayed and discarded")
    equal(list(await desk.store.dead(DeadFilter())), [], "still dead")


async def pruned(desk: Desk) -> None:
    """Prune what has been done or discarded for longer than the retention, in batches, and nothing else."""
    await desk.kill("dead", "discarded")
    await desk.store.discard(DeadFilter(ids=((await desk.store.dead(DeadFilter()))[1].id,)))
    await desk.publish("d1", "d2", "d3", "leased")
    for one in (await desk.take())[:3]:
        await desk.settle(one)
    await desk.publish("waiting")
    await desk.publish("delayed", delay=30 * DAY)
    desk.clock.advance(7 * DAY)
    equal(await desk.store.sweep(retention=7 * DAY, lease=LEASE, batch=10), 0, "swept in time")
    desk.clock.advance(2.0)
    swept = [await desk.store.sweep(retention=7 * DAY, lease=LEASE, batch=2) for _ in range(3)]
    equal(swept, [2, 2, 0], "swept in batches")
    await desk.publish("d1", "discarded")
    equal(sorted(await desk.ids()), ["d1", "discarded", "leased", "waiting"], "due")
    equal([one.message_id for one in await desk.store.dead(DeadFilter())], ["dead"], "dead")


async def after_a_clock_that_jumped(desk: Desk) -> None:
    """Free a lease taken while the clock was ahead, and leave alone whatever else waits."""
    await desk.publish("m", "retried")
    desk.clock.jump(86_400.0)
    ahead, retried = await desk.take()
    await desk.settle(retried, "again", after=1.0)
    desk.clock.jump(-86_400.0)
    await desk.publish("held")
    held = await desk.one()
    await desk.publish("delayed", delay=50 * LEASE)
    await desk.store.sweep(retention=DAY, lease=LEASE, batch=10)
    freed = await desk.one()
    equal((freed.message_id, freed.claims), ("m", ahead.claims + 1), "freed")
    require(await desk.settle(held), "a good lease was taken away")


async def longer_leases(desk: Desk) -> None:
    """Leave a lease alone that is far longer than those of whoever sweeps: another process has other limits."""
    await desk.publish("m")
    claimed = await desk.store.claim(H, owner="another", limit=1, lease=50 * LEASE)
    await desk.store.sweep(retention=DAY, lease=LEASE, batch=10)
    equal(await desk.ids(), [], "due after a sweep")
    require(await desk.settle(claimed.entries[0]), "its lease was taken away")


async def after_a_clock_set_back(desk: Desk) -> None:
    """Give out what was due, or soon, before the clock was set back; what is delayed waits longer by as much."""
    await desk.publish("retried")
    await desk.settle(await desk.one(), "again", after=LEASE / 2)
    await desk.publish("m", "n")
    await desk.publish("o", type="o", key="k")
    await desk.publish("o2", type="o", key="k")
    await desk.publish("delayed", delay=50 * LEASE)
    await desk.store.sweep(retention=DAY, lease=LEASE, batch=2)
    desk.clock.advance(5.0)
    desk.clock.jump(-3600.0)
    equal(await desk.ids(), [], "due before the sweep")
    swept = [await desk.store.sweep(retention=DAY, lease=LEASE, batch=2) for _ in range(4)]
    equal(sorted(await desk.ids()), ["m", "n", "retried"], "due after it")
    equal(await desk.ids(O), ["o"], "head of its lane")
    equal(swept, [2, 2, 1, 0], "swept in batches")
    desk.clock.advance(5.0)
    await desk.publish("later", delay=5.0)
    await desk.store.sweep(retention=DAY, lease=LEASE, batch=2)
    equal(await desk.ids(), [], "due after it was mended")
    desk.clock.advance(5.0)
    equal(await desk.ids(), ["later"], "due in its time")


async def after_a_clock_set_back_unseen(desk: Desk) -> None:
    """Notice when it opens that the clock was set back, once: by when somebody was announced last."""
    await desk.publish("m")
    await desk.store.__aexit__(None, None, None)
    desk.clock.jump(-3600.0)
    desk.store.bind(desk.clock)
    await desk.store.__aenter__()
    await desk.store.announce([Interest(H.name, "t")])
    await desk.store.sweep(retention=DAY, lease=LEASE, batch=10)
    equal(await desk.ids(), ["m"], "due after a sweep")
    await desk.publish("later", delay=5.0)
    desk.store.bind(desk.clock)
    await desk.store.sweep(retention=DAY, lease=LEASE, batch=10)
    equal(await desk.ids(), [], "due after another has opened it")


async def backlog(desk: Desk) -> None:
    """Count per recipient what waits and what is dead, how old it is and who was announced."""
    await desk.kill("dead")
    await desk.publish("a")
    await desk.publish("later", delay=100.0)
    await desk.store.announce([Interest("svc/silent", "t")])
    desk.clock.advance(5.0)
    await desk.publish("o", type="o", key="k")
    desk.clock.advance(DAY - 3.0)
    await desk.store.announce([Interest(O.name, "o", ordered=True)])
    found = {one.recipient: one for one in await desk.store.backlog()}
    plain, ordered = found[H.name], found[O.name]
    equal((plain.waiting, plain.dead, plain.announced), (2, 1, False), "waiting, dead, announced of the plain one")
    equal(plain.oldest, DAY + 2.0, "its oldest")
    equal((ordered.waiting, ordered.dead, ordered.announced), (1, 0, True), "the ordered one")
    equal(ordered.oldest, DAY - 3.0, "its oldest")
    silent = found.get("svc/silent")
    require(silent is None or silent.waiting == 0, "somebody waits who has nothing")


async def renamed(desk: Desk) -> None:
    """Move by an alias what waits and what is dead to the new name, the only one from then on."""
    await desk.kill("dead")
    await desk.publish("a", "b", "c")
    held = (await desk.take(limit=1))[0]
    await desk.store.announce([Interest(NEW.name, "t")], aliases=[(H.name, NEW.name), ("svc/never", NEW.name)])
    await desk.publish("after")
    equal(await desk.ids(H), [], "due for the old name")
    equal(sorted(await desk.ids(NEW)), ["after", "b", "c"], "due for the new name")
    require(await desk.settle(held), "what ran during the change is lost")
    equal([one.handler for one in await desk.store.dead(DeadFilter())], [NEW.name], "whose the dead are")
    await desk.store.announce([Interest(NEW.name, "t")], aliases=[(H.name, NEW.name), (NEW.name, NEW.name)])
    equal([one.recipient for one in await desk.store.backlog() if one.waiting or one.dead], [NEW.name], "names left")


async def renamed_in_order(desk: Desk) -> None:
    """Keep the order of each key over a rename, also while both names are in use."""
    new = Recipient(NEW.name, ordered=True)
    await desk.publish("1", type="o", key="k")
    await desk.store.announce([Interest(new.name, "o", ordered=True)])
    await desk.publish("2", type="o", key="k")
    await desk.store.announce([Interest(new.name, "o", ordered=True)], aliases=[(O.name, new.name)])
    await desk.publish("3", type="o", key="k")
    order: list[str] = []
    while entries := await desk.take(new):
        order += ids(entries)
        for one in entries:
            require(await desk.settle(one), "a claim was lost")
    equal(order, ["1", "2", "3"], "order")


async def forgotten(desk: Desk) -> None:
    """Give a forgotten recipient nothing any more, and bury what it had."""
    await desk.publish("a", "b", "c")
    running = (await desk.take(limit=1))[0]
    equal(await desk.store.forget(H.name), 3, "forgotten")
    equal(await desk.store.forget(H.name), 0, "forgotten twice")
    await desk.publish("d")
    equal(await desk.ids(), [], "due")
    equal([one.error for one in await desk.store.dead(DeadFilter())], ["no handler"] * 3, "errors")
    require(not await desk.settle(running), "the fence of what ran did not move")
    equal(await desk.store.forget("svc/never"), 0, "forgotten though it never was")


async def silent(desk: Desk) -> None:
    """Let die at birth what comes for a silent handler beyond its ceiling, and go on publishing."""
    away = Recipient("svc>broker")
    desk.clock.advance(DAY - 1)
    for n in range(LIMITS.waiting + 2):
        await desk.publish(f"seen{n}")
    equal(await desk.store.forget(H.name), LIMITS.waiting + 2, "waiting while it is not silent")
    await desk.store.announce([Interest(H.name, "t")])
    desk.clock.advance(DAY + 1)
    await desk.store.announce([Interest(O.name, "t", ordered=True)])
    for n in range(LIMITS.waiting + 3):
        await desk.publish(f"silent{n}")
    dead = [one for one in await desk.store.dead(DeadFilter(handler=H.name)) if one.message_id.startswith("silent")]
    equal(len(dead), 3, "born dead")
    require(all("silent" in one.error for one in dead), f"no reason: {dead[0].error}")
    equal(len(await desk.take(O)), LIMITS.waiting + 3, "due for the other handler")
    equal(len(await desk.take(H)), LIMITS.waiting, "due for the silent handler")
    await desk.store.announce([Interest(H.name, "t")])
    await desk.publish("back")
    equal(await desk.ids(H), ["back"], "due once it is announced again")
    equal(await desk.ids(away), [], "due for nobody")


async def listening(desk: Desk) -> None:
    """Listen until cancelled."""
    ended = False

    async def listen() -> None:
        nonlocal ended
        await desk.store.listen(lambda: None)
        ended = True

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        await desk.publish("m")
        require(not ended, "listening ended by itself")
        group.cancel_scope.cancel()
    equal(await desk.ids(), ["m"], "due")


CHECKS: tuple[Check, ...] = checks(
    what_is_shown,
    chosen,
    in_pages,
    replayed,
    discarded,
    by_two_operators,
    pruned,
    after_a_clock_that_jumped,
    longer_leases,
    after_a_clock_set_back,
    after_a_clock_set_back_unseen,
    backlog,
    renamed,
    renamed_in_order,
    forgotten,
    silent,
    listening,
)
