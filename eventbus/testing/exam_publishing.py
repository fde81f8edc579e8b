"""Ask a transport what becomes of what is published."""

import anyio

from eventbus.clock import new_id
from eventbus.errors import PublishError, Refused
from eventbus.testing.exam_bench import Bench, Check, always, is_loss, letters, opened, require
from eventbus.transport import Wire

__all__ = ("CHECKS",)

AFFORDABLE = 16 * 1024 * 1024
"""Bytes beyond which nobody tries what is too large."""


async def bodies(bench: Bench) -> None:
    """Deliver every body byte for byte."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        large = b"x" * min(desk.transport.capabilities.max_bytes, 100_000)
        texts = [
            b"",
            b"{}",
            bytes(range(256)),
            b"\r\n\0\r\n",
            "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve".encode(),
            large,
        ]
        sent = {new_id(): text for text in texts}
        await desk.publish([Wire(id, text) for id, text in sent.items()])
        arrived = {delivery.wire.id: delivery.wire.body for delivery in await desk.take(subscription, len(sent))}
        require(arrived == sent, f"sizes {[*map(len, sent.values())]} arrived as {[*map(len, arrived.values())]}")


async def headers(bench: Bench) -> None:
    """Deliver headers: plain, empty, not ASCII, and long."""
    wire = Wire(new_id(), b"{}", {"plain": "x", "empty": "", "accents": "d\xe9j\xe0 \u20ac", "long": "v" * 4_000})
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        await desk.publish([wire, Wire(new_id(), b"{}")])
        arrived = {delivery.wire.id: dict(delivery.wire.headers) for delivery in await desk.take(subscription, 2)}
        require(arrived.pop(wire.id) == wire.headers, "headers changed on their way")
        require([*arrived.values()] == [{}], f"a message without headers arrived with {arrived}")


async def keys(bench: Bench) -> None:
    """Deliver key and id; no key stays no key."""
    sent = {new_id(): key for key in ("order-1", "cl\xe9 \u20ac/1", "7", None)}
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        await desk.publish([Wire(id, b"{}", key=key) for id, key in sent.items()])
        arrived = {delivery.wire.id: delivery.wire.key for delivery in await desk.take(subscription, len(sent))}
        require(arrived == sent, f"{sent} arrived as {arrived}")


async def nothing(bench: Bench) -> None:
    """Do nothing for an empty list, also to a topic that nobody knows."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        await desk.publish([])
        await desk.transport.publish(f"{desk.topic}.unknown", [])
        await desk.silence(subscription, "nothing was published")


async def batch(bench: Bench) -> None:
    """Deliver a batch of 500, complete and without doubles."""
    sent = letters(500)
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        await desk.publish(sent)
        arrived = await desk.clear(subscription, len(sent))
        require(sorted(arrived) == sorted(wire.id for wire in sent), "some arrived twice and others not")
        await desk.silence(subscription, "the whole batch had arrived")


async def together(bench: Bench) -> None:
    """Deliver 500 concurrent publishes, complete and without doubles."""
    sent = letters(500)
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        async with anyio.create_task_group() as tasks:
            for wire in sent:
                tasks.start_soon(desk.publish, [wire])
        arrived = await desk.clear(subscription, len(sent))
        require(sorted(arrived) == sorted(wire.id for wire in sent), "some arrived twice and others not")


async def faults(bench: Bench) -> None:
    """Name exactly those wires of one call that failed; the others arrive."""
    wires = [Wire(new_id(), b"fault" if number in (1, 3) else b"fine") for number in range(5)]
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        if bench.faulty is None:
            raise AssertionError("the transport confirms every wire: say by Bench(faulty=...) how one of them fails")
        with bench.faulty(desk.transport):
            try:
                await desk.publish(wires)
            except PublishError as error:
                require({*error.failed} == {1, 3}, f"only 1 and 3 should have failed, not {error.failed}")
            else:
                raise AssertionError("two wires failed, and nothing was said")
        arrived = {delivery.wire.id for delivery in await desk.take(subscription, 3)}
        require(arrived == {wires[number].id for number in (0, 2, 4)}, "some that had not failed did not arrive")


async def settled(bench: Bench) -> None:
    """Return from publish when the wire is settled, and not before."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        returned = anyio.Event()

        async def publish() -> None:
            await desk.publish(letters(1))
            returned.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            [delivery] = await desk.take(subscription, 1)
            await anyio.sleep(bench.quiet)
            require(not returned.is_set(), "publish returned, and nobody had settled the wire")
            await delivery.ack()
            with anyio.fail_after(bench.patience):
                await returned.wait()


async def too_large(bench: Bench) -> None:
    """Refuse a body over the maximum, and deliver its neighbours."""
    first, second, third = letters(3)
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        large = Wire(second.id, b"x" * (desk.transport.capabilities.max_bytes + 1))
        try:
            await desk.publish([first, large, third])
        except PublishError as error:
            kinds = {index: type(failure) for index, failure in error.failed.items()}
            require(kinds == {1: Refused}, f"only number 1 should be refused, not {kinds}")
        else:
            raise AssertionError("nothing was refused")
        arrived = {delivery.wire.id for delivery in await desk.take(subscription, 2)}
        require(arrived == {first.id, third.id}, "the neighbours of what was refused did not arrive")
        await desk.silence(subscription, "it had been refused")


async def unheard(bench: Bench) -> None:
    """Keep, refuse or lose, as declared, what is published before anybody listens."""
    sent = letters(3)
    async with opened(bench) as desk:
        declared = desk.transport.capabilities.unheard
        try:
            await desk.publish(sent)
        except PublishError as error:
            require(declared == "refused", f"declared to be {declared}, but: {error}")
            require(is_loss(error) and len(error.failed) == 3, f"all should be Lost, not {error.failed}")
            return
        require(declared != "refused", "declared to be refused, but publish returned")
        async with desk.subscribe() as subscription:
            if declared == "kept":
                await desk.clear(subscription, len(sent))
            await desk.silence(subscription, "nobody listened when it was published")


async def nobody(bench: Bench) -> None:
    """Say Lost when a broker confirms what it keeps for nobody."""
    async with opened(bench) as desk:
        try:
            await desk.publish(letters(3))
        except PublishError as error:
            require(is_loss(error) and len(error.failed) == 3, f"all should be Lost, not {error.failed}")
        else:
            raise AssertionError("it was confirmed, and nobody will ever get it")


CHECKS = (
    Check(1, always, bodies),
    Check(2, lambda capabilities: capabilities.headers, headers),
    Check(3, always, keys),
    Check(4, always, nothing),
    Check(5, lambda capabilities: capabilities.settle != "none", batch),
    Check(6, lambda capabilities: capabilities.settle != "none", together),
    Check(7, lambda capabilities: capabilities.confirm == "stored", faults),
    Check(8, lambda capabilities: capabilities.max_bytes <= AFFORDABLE, too_large),
    Check(11, lambda capabilities: capabilities.confirm == "settled", settled),
    Check(12, lambda capabilities: capabilities.unheard != "lost" or capabilities.confirm == "none", unheard),
    Check(13, lambda capabilities: capabilities.unheard == "lost" and capabilities.confirm == "stored", nobody),
)
