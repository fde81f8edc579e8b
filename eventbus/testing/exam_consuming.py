"""Ask a transport who gets what, and how much at once."""

from contextlib import AsyncExitStack

import anyio

from eventbus.errors import Refused
from eventbus.testing.exam_bench import Bench, Check, Desk, always, letters, opened, require, until

__all__ = ("CHECKS",)

PAUSE = 0.01
"""Seconds that a consumer works on one message, so that the others get a turn."""


async def credit(bench: Bench) -> None:
    """Never have more than prefetch unsettled, and let one more in for each that is settled."""
    async with opened(bench, "a") as desk, desk.subscribe(prefetch=5) as subscription:
        await desk.publish(letters(40))
        held = await desk.take(subscription, 5)
        await desk.silence(subscription, "five of five were unsettled")
        for _ in range(3):
            await held.pop().ack()
            held += await desk.take(subscription, 1)
            await desk.silence(subscription, "only one had been settled")


async def two_groups(bench: Bench) -> None:
    """Give each of two groups everything."""
    sent = letters(20)
    async with opened(bench, "a", "b") as desk, desk.subscribe("a") as first, desk.subscribe("b") as second:
        await desk.publish(sent)
        for subscription in (first, second):
            arrived = await desk.clear(subscription, len(sent))
            require(sorted(arrived) == sorted(wire.id for wire in sent), "a group missed some and got others twice")


async def sharing(bench: Bench) -> None:
    """Share a group's messages between two consumers, without overlap, some for each."""
    await _share(bench, at_first=2, later=0)


async def newcomer(bench: Bench) -> None:
    """Give a third consumer that comes late its share."""
    await _share(bench, at_first=2, later=1)


async def _share(bench: Bench, *, at_first: int, later: int) -> None:
    first, second = letters(60), letters(60) if later else []
    done: list[list[str]] = [[] for _ in range(at_first + later)]
    everything = sorted(wire.id for wire in [*first, *second])
    async with opened(bench, "a") as desk, AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        for notes in done:
            if notes is done[-1] and later:
                await until(lambda: sum(map(len, done)) >= 30, bench.patience, "nobody works")
            tasks.start_soon(desk.work, await stack.enter_async_context(desk.subscribe(prefetch=5)), notes, PAUSE)
            if notes is done[at_first - 1]:
                await desk.publish(first)
        await desk.publish(second)
        count = len(everything)
        await until(lambda: sum(map(len, done)) >= count, bench.patience, f"fewer than {count} were handled")
        require(sorted(id for notes in done for id in notes) == everything, "some were handled twice, others never")
        require(all(done), f"the consumers handled {[len(notes) for notes in done]}")
        await anyio.sleep(2 * PAUSE)
        tasks.cancel_scope.cancel()


async def broadcast(bench: Bench) -> None:
    """Broadcast to every subscriber from its subscription on, and nothing from before."""
    earlier, later = letters(2), letters(3)
    async with opened(bench, "a") as desk, desk.subscribe() as regular:
        await desk.publish(earlier)
        async with desk.subscribe(None) as first, desk.subscribe(None) as second:
            await desk.publish(later)
            for subscription in (first, second):
                arrived = [delivery.wire.id for delivery in await desk.take(subscription, len(later))]
                require(sorted(arrived) == sorted(wire.id for wire in later), "a subscriber got something else")
                await desk.silence(subscription, "it had everything since its subscription")
        await desk.take(regular, len(earlier) + len(later))


async def topics(bench: Bench) -> None:
    """Keep topics apart, also where their names differ in one character; a broker that cannot may refuse the second."""
    async with opened(bench, "a") as desk, AsyncExitStack() as stack:
        sent = {f"{desk.topic}{end}": letters(1) for end in (".b", "_b", ".b.c", "-b")}
        for topic in [*sent]:
            try:
                await desk.transport.declare(topic, ["a"] if desk.transport.capabilities.groups else [])
            except Refused:
                del sent[topic]
        require(len(sent) > 2, "most of the names were refused")
        subscriptions = {
            topic: await stack.enter_async_context(Desk(bench, desk.transport, topic).subscribe()) for topic in sent
        }
        for topic, wires in sent.items():
            await desk.transport.publish(topic, wires)
        for topic, subscription in subscriptions.items():
            [delivery] = await desk.take(subscription, 1)
            require(delivery.wire.id == sent[topic][0].id, f"{topic} got the message of another topic")
            await desk.silence(subscription, "it belongs to another topic")


async def idle(bench: Bench) -> None:
    """Deliver within a second after a long silence."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        await desk.silence(subscription, "nothing had been published")
        await anyio.sleep(2 * bench.quiet)
        await desk.publish(letters(1))
        await desk.take(subscription, 1, within=1.0)


CHECKS = (
    Check(14, lambda capabilities: capabilities.settle != "none", credit),
    Check(15, lambda capabilities: capabilities.groups and capabilities.settle != "none", two_groups),
    Check(16, lambda capabilities: capabilities.groups and capabilities.settle != "none", sharing),
    Check(17, lambda capabilities: capabilities.groups and capabilities.settle != "none", newcomer),
    Check(18, lambda capabilities: capabilities.broadcast, broadcast),
    Check(20, always, topics),
    Check(21, always, idle),
)
