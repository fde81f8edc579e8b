"""Ask a transport what becomes of a delivery: settled, handed back, postponed, dead, or left behind."""

from collections.abc import Awaitable, Callable, Sequence

import anyio
from anyio import current_time

from eventbus.clock import new_id
from eventbus.errors import SettleError
from eventbus.testing.exam_bench import Bench, Check, Desk, always, letters, opened, require, until
from eventbus.transport import Capabilities, Delivery, Subscription, Wire

__all__ = ("CHECKS",)


def can_settle(capabilities: Capabilities) -> bool:
    """Need a transport whose deliveries can be settled."""
    return capabilities.settle != "none"


def brings_back(capabilities: Capabilities) -> bool:
    """Need a transport that brings unsettled deliveries back."""
    return capabilities.returns != "none"


def can_postpone(capabilities: Capabilities) -> bool:
    """Need a transport that delays by itself."""
    return capabilities.retry > 0


async def final(bench: Bench) -> None:
    """Never bring back what was acked, not after the lease and not to another subscription."""
    async with opened(bench, "a") as desk:
        async with desk.subscribe() as subscription:
            await desk.publish(letters(10))
            await desk.clear(subscription, 10)
        if desk.transport.capabilities.returns == "lease":
            await anyio.sleep(1.2 * bench.lease)
        async with desk.subscribe() as subscription:
            await desk.silence(subscription, "it was acked")


async def out_of_order(bench: Bench) -> None:
    """Bring back what was not acked when acks came out of order, and what was only after a gap."""
    sent = letters(10, key="k")
    async with opened(bench, "a") as desk:
        async with desk.subscribe() as subscription:
            await desk.publish(sent)
            held = await desk.take(subscription, len(sent))
            for index in (5, 1, 0):
                await held[index].ack()
        unsettled = [delivery.wire.id for index, delivery in enumerate(held) if index not in (5, 1, 0)]
        repeated = [] if desk.transport.capabilities.settle == "each" else [held[5].wire.id]
        await _come_back(desk, unsettled, repeated)


async def crash(bench: Bench) -> None:
    """Bring back what a consumer had not settled when it died, within its lease and two seconds."""
    sent = letters(7)
    async with opened(bench, "a") as desk:
        with anyio.CancelScope() as life:
            async with desk.subscribe() as subscription:
                await desk.publish(sent)
                await desk.take(subscription, len(sent))
                life.cancel()
                await anyio.sleep_forever()
        await _come_back(desk, [wire.id for wire in sent])


async def leaving(bench: Bench) -> None:
    """Bring back what a consumer had not settled when it left, also if it had stopped before."""
    sent = letters(7)
    async with opened(bench, "a") as desk:
        async with desk.subscribe() as subscription:
            await desk.publish(sent)
            await desk.take(subscription, len(sent))
            await subscription.stop()
        await _come_back(desk, [wire.id for wire in sent])


async def _come_back(desk: Desk, ids: Sequence[str], repeated: Sequence[str] = ()) -> None:
    within = desk.bench.lease + 2.0 if desk.transport.capabilities.returns == "lease" else 2.0
    async with desk.subscribe() as subscription:
        back = [delivery.wire.id for delivery in await desk.take(subscription, len(ids), within=within)]
        while missing := set(ids) - set(back):
            require(set(back) <= {*ids, *repeated}, "something came back that had been settled")
            back += [delivery.wire.id for delivery in await desk.take(subscription, len(missing), within=within)]
        require(set(back) <= {*ids, *repeated}, "something came back that had been settled")


async def attempts(bench: Bench) -> None:
    """Count deliveries from 1, or say 0 always."""
    async with opened(bench, "a") as desk:
        counts, promises = [1, 2, 3], desk.transport.capabilities
        for count in counts if promises.returns != "none" else counts[:1]:
            async with desk.subscribe() as subscription:
                if count == 1:
                    await desk.publish(letters(1))
                [delivery] = await desk.take(subscription, 1, within=bench.patience + bench.lease)
                expected = count if promises.attempts else 0
                require(delivery.attempt == expected, f"delivery {count} says it is attempt {delivery.attempt}")


async def postponed(bench: Bench) -> None:
    """Bring back what was postponed not too early, and at most its grain and a second late."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        promises = desk.transport.capabilities
        after = min(max(0.3, promises.grain), promises.retry)
        await desk.publish(letters(1))
        [delivery] = await desk.take(subscription, 1)
        start = current_time()
        await delivery.retry(after)
        await desk.take(subscription, 1, within=after + promises.grain + 1.0)
        waited = current_time() - start
        require(waited >= after, f"it was to wait {after:g} s and came after {waited:g} s")


async def handed_back(bench: Bench) -> None:
    """Bring back at once what was handed back."""
    async with opened(bench, "a") as desk, desk.subscribe(prefetch=1) as subscription:
        await desk.publish(letters(2, key="k"))
        for _ in range(3):
            [delivery] = await desk.take(subscription, 1, within=1.0)
            await delivery.retry(0)
        require(len(set(await desk.clear(subscription, 2))) == 2, "one was lost by handing back")
        await desk.silence(subscription, "all was settled")


async def others(bench: Bench) -> None:
    """Show a retry to no other group."""
    async with opened(bench, "a", "b") as desk, desk.subscribe("a") as first, desk.subscribe("b") as second:
        await desk.publish(letters(1))
        await desk.clear(second, 1)
        for after in (0.0, min(0.05, desk.transport.capabilities.retry)):
            [delivery] = await desk.take(first, 1)
            await delivery.retry(after)
        await desk.clear(first, 1)
        await desk.silence(second, "only the other group wanted it again")


async def unchanged(bench: Bench) -> None:
    """Keep id, key, headers and body over a retry."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        extra = {"accents": "d\xe9j\xe0"} if desk.transport.capabilities.headers else {}
        sent = Wire(new_id(), bytes(range(256)), extra, "cl\xe9")
        await desk.publish([sent])
        for _ in range(3):
            [delivery] = await desk.take(subscription, 1)
            got = delivery.wire
            same = (got.id, got.body, dict(got.headers), got.key) == (sent.id, sent.body, extra, sent.key)
            require(same, f"{sent} came again as {got}")
            await delivery.retry(min(0.05, desk.transport.capabilities.retry))


async def rejected(bench: Bench) -> None:
    """Keep what was rejected with its reason, gone for its group and untouched for others."""
    async with opened(bench, "a", "b") as desk:
        require(bench.dead is not None, "the transport declares dead=True: show what is dead by Bench(dead=...)")
        first, second = letters(2)
        async with desk.subscribe("a") as subscription:
            await desk.publish([first, second])
            for delivery in await desk.take(subscription, 2):
                await (delivery.reject("card stolen") if delivery.wire.id == first.id else delivery.ack())
            await desk.silence(subscription, "it was settled")
        async with desk.subscribe("a") as subscription:
            await desk.silence(subscription, "it was settled")
        if bench.dead is not None:
            kept = {group: [*await bench.dead(desk.transport, desk.topic, group)] for group in ("a", "b")}
            require(kept == {"a": [(first.id, "card stolen")], "b": []}, f"among the dead are {kept}")
        async with desk.subscribe("b") as subscription:
            await desk.clear(subscription, 2)


async def extended(bench: Bench) -> None:
    """Keep what is extended from everybody else, for three leases."""
    async with opened(bench, "a") as desk, desk.subscribe() as first, desk.subscribe() as second:
        await desk.publish(letters(1))
        got: list[tuple[Delivery, Subscription]] = []

        async def receive(one: Subscription) -> None:
            got.append((await one.receive(), one))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive, first)
            tasks.start_soon(receive, second)
            await until(lambda: bool(got), bench.patience, "nothing arrived")
            for _ in range(9):
                await anyio.sleep(bench.lease / 3)
                await got[0][0].extend()
                require(len(got) == 1, "another consumer got it, though it had been extended in time")
            await got[0][0].ack()
            tasks.cancel_scope.cancel()
        await anyio.sleep(bench.lease)
        for subscription in (first, second):
            await desk.silence(subscription, "it was acked")


async def lapsed(bench: Bench) -> None:
    """Raise SettleError for a verb that comes after the lease, and leave the new owner alone."""
    async with opened(bench, "a") as desk, desk.subscribe() as first:
        await desk.publish(letters(4))
        held = await desk.take(first, 4)
        await first.stop()
        async with desk.subscribe() as second:
            again = {one.wire.id: one for one in await desk.take(second, 4, within=bench.lease + 2.0)}
            for verb in (held[0].ack, lambda: held[1].retry(0), lambda: held[2].reject("late"), held[3].extend):
                require(not await _obeyed(verb), "a verb of the old owner was obeyed")
            for one in again.values():
                await one.ack()
            await desk.silence(second, "all was settled by the new owner")
            if bench.dead is not None:
                require(not await bench.dead(desk.transport, desk.topic, "a"), "the old owner made it dead")


async def _obeyed(verb: Callable[[], Awaitable[None]]) -> bool:
    try:
        await verb()
    except SettleError:
        return False
    return True


async def second_verb(bench: Bench) -> None:
    """Obey the first settling verb and ignore later ones."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        await desk.publish(letters(1))
        [delivery] = await desk.take(subscription, 1)
        await delivery.extend()
        await delivery.retry(0)
        await delivery.ack()
        await delivery.reject("too late")
        [delivery] = await desk.take(subscription, 1)
        await delivery.ack()
        await delivery.ack()
        await delivery.retry(0)
        await delivery.reject("too late")
        await desk.silence(subscription, "it was acked")
        if bench.dead is not None:
            require(not await bench.dead(desk.transport, desk.topic, "a"), "a second verb made it dead")


CHECKS = (
    Check(22, can_settle, final),
    Check(24, lambda capabilities: can_settle(capabilities) and brings_back(capabilities), out_of_order),
    Check(25, brings_back, crash),
    Check(26, always, attempts),
    Check(27, can_postpone, postponed),
    Check(28, can_settle, handed_back),
    Check(29, lambda capabilities: can_postpone(capabilities) and capabilities.groups, others),
    Check(30, can_postpone, unchanged),
    Check(32, lambda capabilities: capabilities.dead and capabilities.groups, rejected),
    Check(34, lambda capabilities: capabilities.returns == "lease", extended),
    Check(35, lambda capabilities: capabilities.returns == "lease", lapsed),
    Check(36, can_settle, second_verb),
    Check(41, brings_back, leaving),
)
