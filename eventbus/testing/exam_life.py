"""Ask a transport about order, stopping, closing, and being cut at any point."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import anyio
from anyio.lowlevel import checkpoint

from eventbus.clock import new_id
from eventbus.errors import Lost, SettleError, TransportError
from eventbus.testing.exam_bench import Bench, Check, Desk, always, is_loss, letters, opened, require, until
from eventbus.transport import Capabilities, Delivery, Subscription, Wire

__all__ = ("CHECKS",)

KEYS = ("red", "green", "blue")

CUTS = 12
"""Turns of the event loop after which an operation is cut: from none to so many."""


def keeps_order(capabilities: Capabilities) -> bool:
    """Need a transport that keeps the order of a key."""
    return capabilities.order != "none" and capabilities.settle != "none"


def brings_back(capabilities: Capabilities) -> bool:
    """Need a transport that brings unsettled deliveries back."""
    return capabilities.returns != "none"


def by_key(wires: list[Wire]) -> dict[str, list[str]]:
    """Return the ids of each key."""
    return {key: [wire.id for wire in wires if wire.key == key] for key in KEYS}


async def _in_order(desk: Desk, count: int) -> list[Wire]:
    sent = [letters(1, key=KEYS[number % len(KEYS)])[0] for number in range(count)]
    for wire in sent:
        await desk.publish([wire])
    return sent


async def one_consumer(bench: Bench) -> None:
    """Give one consumer the messages of each key in the order of their publishing."""
    async with opened(bench, "a", ordered=True) as desk, desk.subscribe(prefetch=1, ordered=True) as subscription:
        sent = await _in_order(desk, 30)
        got: list[Wire] = []
        for _ in sent:
            [delivery] = await desk.take(subscription, 1)
            got.append(delivery.wire)
            await delivery.ack()
        require(by_key(got) == by_key(sent), f"published {by_key(sent)}, got {by_key(got)}")


async def one_process(bench: Bench) -> None:
    """Let only one of two ordered consumers have unsettled messages of a key, and keep the order."""
    got: list[Wire] = []
    held: list[tuple[str | None, str]] = []
    async with (
        opened(bench, "a", ordered=True) as desk,
        desk.subscribe(prefetch=10, ordered=True) as first,
        desk.subscribe(prefetch=10, ordered=True) as second,
        anyio.create_task_group() as tasks,
    ):

        async def consume(name: str, subscription: Subscription) -> None:
            while True:
                delivery = await subscription.receive()
                key = delivery.wire.key
                require({who for what, who in held if what == key} <= {name}, f"two consumers had {key} at once")
                held.append((key, name))
                got.append(delivery.wire)
                tasks.start_soon(finish, name, delivery)

        async def finish(name: str, delivery: Delivery) -> None:
            await anyio.sleep(0.01)
            held.remove((delivery.wire.key, name))
            await delivery.ack()

        tasks.start_soon(consume, "first", first)
        tasks.start_soon(consume, "second", second)
        sent = await _in_order(desk, 60)
        await until(lambda: len(got) >= len(sent) and not held, bench.patience, "not all messages arrived")
        await anyio.sleep(bench.quiet)
        require(by_key(got) == by_key(sent), f"published {by_key(sent)}, got {by_key(got)}")
        tasks.cancel_scope.cancel()


async def successor(bench: Bench) -> None:
    """Go on in order with what was unsettled when the consumer that had the key dies."""
    sent = letters(30, key=KEYS[0])
    async with opened(bench, "a", ordered=True) as desk, AsyncExitStack() as longer:
        async with desk.subscribe(prefetch=10, ordered=True) as first:
            for wire in sent:
                await desk.publish([wire])
            held = await desk.take(first, 10)
            second = await longer.enter_async_context(desk.subscribe(prefetch=10, ordered=True))
            for delivery in held[:3]:
                await delivery.ack()
            await desk.silence(second, "another consumer has its key")
        got = await desk.clear(second, len(sent) - 3)
        require(got == [wire.id for wire in sent[3:]], "the rest came in another order, or twice")


async def stopping(bench: Bench) -> None:
    """Deliver nothing after stop, take acks still, and give the rest to the next consumer at once."""
    sent = letters(20)
    async with opened(bench, "a") as desk, AsyncExitStack() as life:
        moves = desk.transport.capabilities.returns == "rebalance"  # what is left goes over as a whole, on leaving
        first = await life.enter_async_context(desk.subscribe(prefetch=10))
        await desk.publish(sent)
        held = await desk.take(first, 3)
        await first.stop()
        for _ in range(2):
            with anyio.fail_after(bench.patience):
                while delivery := await _next(first):
                    await delivery.retry(0)
        if moves:
            for delivery in held:
                await delivery.ack()
            await life.aclose()
        async with desk.subscribe() as second:
            rest = await desk.take(second, len(sent) - len(held), within=1.0)
            for delivery in rest if moves else [*held, *rest]:
                await delivery.ack()
            require({one.wire.id for one in [*held, *rest]} == {wire.id for wire in sent}, "some came twice")
            await desk.silence(second, "all was settled")
        async with desk.subscribe() as third:
            await desk.silence(third, "all was settled")


async def _next(subscription: Subscription) -> Delivery | None:
    try:
        return await subscription.receive()
    except anyio.EndOfStream:
        return None


async def nothing_left(bench: Bench) -> None:
    """Leave no task and no thread behind."""
    tasks, threads = len(anyio.get_running_tasks()), threading.active_count()
    for _ in range(3):
        async with opened(bench, "a") as desk, desk.subscribe() as one:
            await desk.publish(letters(3))
            for delivery in await desk.take(one, 1):
                await delivery.retry(desk.transport.capabilities.retry and 0.01)
            async with desk.subscribe() as other:
                await other.stop()
    await until(lambda: len(anyio.get_running_tasks()) <= tasks, bench.patience, "tasks were left")
    await until(lambda: threading.active_count() <= threads, bench.patience, "threads were left")


async def closing(bench: Bench) -> None:
    """Give every waiter Lost within two seconds of a close under load."""
    ends: list[TransportError] = []
    topic, progress = f"exam.{new_id()}", 0

    async def worker(work: Callable[[], Awaitable[None]]) -> None:
        nonlocal progress
        try:
            while True:
                await work()
                progress += 1
        except TransportError as error:
            ends.append(error)

    async with anyio.create_task_group() as tasks:
        async with bench.make() as transport:
            desk = Desk(bench, transport, topic)
            await transport.declare(topic, ["a"])

            async def publish() -> None:
                await desk.publish(letters(2))

            async def consume() -> None:
                async with desk.subscribe() as subscription:
                    while True:
                        await (await subscription.receive()).ack()

            async def wait() -> None:
                async with Desk(bench, transport, f"{topic}.silent").subscribe() as subscription:
                    await subscription.receive()

            for work in (publish, publish, consume, wait):
                tasks.start_soon(worker, work)
            await until(lambda: progress > 20, bench.patience, "no progress before the end")
        tasks.cancel_scope.deadline = anyio.current_time() + 2.0
    require(len(ends) == 4, f"only {len(ends)} of 4 waiters ended within 2 s")
    require(all(is_loss(end) or isinstance(end, SettleError) for end in ends), f"they ended with {ends}")


async def cuts(bench: Bench) -> None:
    """Survive a cancellation of publish, receive, subscribe or stop anywhere, and keep nothing for nobody."""
    async with opened(bench, "a") as desk:

        async def publish() -> None:
            await desk.publish(letters(3))

        async def consume() -> None:
            async with desk.subscribe() as subscription:
                await checkpoint()
                delivery = await subscription.receive()
                await checkpoint()
                await delivery.ack()
                await subscription.receive()

        async def stop() -> None:
            async with desk.subscribe() as subscription:
                await subscription.stop()
                await _next(subscription)

        for turns in range(CUTS):
            for operation in (publish, consume, stop, publish, publish):
                await _cut(operation, turns)
                await _cut_natively(operation, turns)
        async with desk.subscribe() as subscription:
            patience = bench.quiet + (bench.lease if desk.transport.capabilities.returns == "lease" else 0.0)
            arrived = True
            while arrived:
                with anyio.move_on_after(patience) as waiting:
                    await (await subscription.receive()).ack()
                arrived = not waiting.cancelled_caught
            sent = letters(20)
            await desk.publish(sent)
            got = await desk.clear(subscription, len(sent))
            require(sorted(got) == sorted(wire.id for wire in sent), "something came back that nobody had lost")


async def _cut(operation: Callable[[], Awaitable[None]], turns: int) -> None:
    scope = anyio.CancelScope()

    async def run() -> None:
        with scope:
            await operation()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await _turn(turns)
        scope.cancel()


async def _cut_natively(operation: Callable[[], Awaitable[None]], turns: int) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return  # another event loop: there is only one kind of cancellation
    task = asyncio.ensure_future(operation())
    await _turn(turns)
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _turn(turns: int) -> None:
    for turn in range(turns):
        await anyio.sleep(0 if turn < CUTS // 2 else 0.002)


async def opening_again(bench: Bench) -> None:
    """Raise Lost once when closed, and opened again bring back what was unsettled."""
    transport, sent, acked, losses = bench.make(), letters(9), "", list[TransportError]()
    desk = Desk(bench, transport, f"exam.{new_id()}")

    async def wait() -> None:
        async with Desk(bench, transport, f"{desk.topic}.silent").subscribe() as subscription:
            try:
                await subscription.receive()
            except Lost as error:
                losses.append(error)

    async with anyio.create_task_group() as tasks:
        async with transport:
            await transport.declare(desk.topic, ["a"])
            tasks.start_soon(wait)
            async with desk.subscribe() as subscription:
                await desk.publish(sent)
                delivery, *_ = await desk.take(subscription, 4)
                await delivery.ack()
                acked = delivery.wire.id
            await anyio.sleep(bench.quiet)
        tasks.cancel_scope.deadline = anyio.current_time() + 2.0
    require(len(losses) == 1, "receive did not raise Lost when the transport was closed")
    async with transport:
        await transport.declare(desk.topic, ["a"])
        async with desk.subscribe() as subscription:
            got = await desk.clear(subscription, len(sent) - 1)
            require({*got, acked} == {wire.id for wire in sent}, "not all that was unsettled came back")
            await desk.silence(subscription, "all was settled")


CHECKS = (
    Check(37, keeps_order, one_consumer),
    Check(38, keeps_order, one_process),
    Check(39, lambda capabilities: keeps_order(capabilities) and brings_back(capabilities), successor),
    Check(40, lambda capabilities: capabilities.settle != "none" and capabilities.groups, stopping),
    Check(42, always, nothing_left),
    Check(43, lambda capabilities: capabilities.settle != "none", closing),
    Check(44, lambda capabilities: capabilities.settle != "none", cuts),
    Check(45, brings_back, opening_again),
)
