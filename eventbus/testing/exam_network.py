"""Ask a transport what it does with the network: how often it writes, what it leaves open, how it bears silence.

Asked where a test can stand between a transport and its broker. A transport without a network has nothing to gather,
to hang up or to lose on the way, so one that is ``local`` is asked nothing here.
"""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from eventbus.errors import TransportError
from eventbus.testing.exam_bench import (
    Bench,
    Check,
    Desk,
    Network,
    broker_of,
    is_loss,
    is_lost,
    is_remote,
    letters,
    opened,
    require,
    until,
)
from eventbus.transport import Capabilities

__all__ = ("CHECKS",)

DELAY = 0.05
"""Seconds that a slow network holds back what is written."""

SILENT = 15.0
"""Seconds within which a broker that says nothing any more is said to be lost."""
LARGE = 50_000
"""Bytes of a message that arrives in pieces."""


def settles_remotely(capabilities: Capabilities) -> bool:
    """Need a broker that hears of every settlement."""
    return is_remote(capabilities) and capabilities.settle != "none"


def takes_turns(capabilities: Capabilities) -> bool:
    """Need a lease that makes one process the owner of what is ordered."""
    return is_remote(capabilities) and capabilities.order == "exclusive" and capabilities.returns == "lease"


async def publishes_together(bench: Bench) -> None:
    """Write concurrent publishes together, and wait for all their confirmations at once."""
    sent = letters(500)
    async with broker_of(bench).network() as network, opened(replace(bench, make=network.make), "a") as desk:
        await desk.publish(letters(1))

        async def publish(number: int) -> None:
            await desk.publish([sent[number]])

        await _in_few_pieces(network, len(sent), publish)


async def acks_together(bench: Bench) -> None:
    """Write concurrent acks together, and wait for all their answers at once."""
    async with (
        broker_of(bench).network() as network,
        opened(replace(bench, make=network.make), "a") as desk,
        desk.subscribe(prefetch=200) as subscription,
    ):
        await desk.publish(letters(200))
        held = await desk.take(subscription, 200)

        async def ack(number: int) -> None:
            await held[number].ack()

        await _in_few_pieces(network, len(held), ack)


async def _in_few_pieces(network: Network, count: int, operation: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    network.delay(DELAY)
    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(operation, number)
    pieces = network.pieces()
    require(pieces < count / 4, f"{count} at once were written in {pieces} pieces")
    network.delay(0.0)


async def crashed_listener(bench: Bench) -> None:
    """Have the broker forget a broadcast subscriber that crashed, and go on to serve another."""
    broker = broker_of(bench)
    async with opened(bench) as desk, desk.subscribe(None) as survivor:
        before = {*await broker.left(desk.topic)}

        async def listen(network: Network, *, task_status: TaskStatus[None]) -> None:
            with suppress(TransportError):
                async with network.make() as transport, Desk(bench, transport, desk.topic).subscribe(None) as doomed:
                    task_status.started()
                    await doomed.receive()

        async with anyio.create_task_group() as tasks, broker.network() as network:
            await tasks.start(listen, network)
            network.swallow()  # so that nobody hears a farewell when the connections are cut
        with anyio.move_on_after(bench.patience):
            while {*await broker.left(desk.topic)} - before:  # noqa: ASYNC110 - the broker does not tell
                await anyio.sleep(0.1)
        remainder = {*await broker.left(desk.topic)} - before
        require(not remainder, f"of a subscriber that is gone the broker keeps {remainder}")
        sent = letters(3)
        await desk.publish(sent)
        got = [delivery.wire.id for delivery in await desk.take(survivor, len(sent))]
        require(sorted(got) == sorted(wire.id for wire in sent), "another subscriber got something else")


async def hung_up(bench: Bench) -> None:
    """Leave no connection behind, whether it was closed or cancelled."""
    async with broker_of(bench).network() as network:
        for cancelled in (False, True):
            with anyio.CancelScope() as life:
                async with opened(replace(bench, make=network.make), "a") as desk, desk.subscribe() as subscription:
                    await desk.publish(letters(3))
                    await desk.take(subscription, 1)
                    require(network.connections(), "it does not go this way")
                    if cancelled:
                        life.cancel()
                        await checkpoint()
            await until(lambda: not network.connections(), bench.patience, "connections were left")


async def silent(bench: Bench) -> None:
    """Say Lost within fifteen seconds when the network swallows everything, to who receives and to who publishes."""
    ready = [anyio.Event(), anyio.Event()]

    async def receive() -> None:
        async with opened(through, "a") as desk, desk.subscribe() as subscription:
            await desk.publish(letters(1))
            [delivery] = await desk.take(subscription, 1)
            await delivery.ack()
            ready[0].set()
            await network_is_silent.wait()
            await is_lost(subscription, SILENT)

    async def publish() -> None:
        async with opened(through, "a") as desk:
            await desk.publish(letters(1))
            ready[1].set()
            await network_is_silent.wait()
            if desk.transport.capabilities.confirm != "none":
                await _is_lost_publishing(desk)

    async with broker_of(bench).network() as network:
        through, network_is_silent = replace(bench, make=network.make), anyio.Event()
        async with anyio.create_task_group() as tasks:  # a transport each: a loss that one notices would tell the other
            tasks.start_soon(receive)
            tasks.start_soon(publish)
            for one in ready:
                await one.wait()
            network.swallow()
            network_is_silent.set()


async def _is_lost_publishing(desk: Desk) -> None:
    with anyio.fail_after(SILENT):
        try:
            await desk.publish(letters(1))
        except TransportError as error:
            require(is_loss(error), f"it should be Lost, not {error!r}")
        else:
            raise AssertionError("a publish was confirmed by nobody")


async def one_owner(bench: Bench) -> None:
    """Hand out nothing in order any more by the time that another does, and all in order, though the network is off."""
    sent = [replace(wire, body=wire.body.ljust(LARGE)) for wire in letters(20, key="k")]  # each comes by itself
    async with (
        broker_of(bench).network() as network,
        opened(bench, "a", ordered=True) as desk,
        network.make() as transport,
        Desk(bench, transport, desk.topic).subscribe(ordered=True) as first,
    ):
        await desk.publish(sent[:1])
        await desk.take(first, 1)
        for wire in sent[1:]:
            await desk.publish([wire])
        await anyio.sleep(bench.quiet)
        network.swallow()
        async with desk.subscribe(ordered=True) as second:
            got = [delivery.wire.id for delivery in await desk.take(second, len(sent), within=SILENT)]
            require(got == [wire.id for wire in sent], "what the other had held came in another order, or twice")
            with suppress(TransportError):
                await desk.silence(first, "another has its key by now")


CHECKS = (
    Check(6, settles_remotely, publishes_together),
    Check(19, lambda capabilities: is_remote(capabilities) and capabilities.broadcast, crashed_listener),
    Check(23, settles_remotely, acks_together),
    Check(42, is_remote, hung_up),
    Check(47, is_remote, silent),
    Check(48, takes_turns, one_owner),
)
