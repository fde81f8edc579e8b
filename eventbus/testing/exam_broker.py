"""Ask a transport what it does when its broker is away, killed or emptied; asked where a test can do that."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

import anyio
from anyio import current_time

from eventbus.clock import new_id
from eventbus.errors import Lost, SettleError, TransportError
from eventbus.testing.exam_bench import (
    Bench,
    Check,
    Desk,
    broker_of,
    is_loss,
    is_lost,
    is_remote,
    letters,
    opened,
    require,
    until,
)
from eventbus.transport import Capabilities, Subscription, Wire

__all__ = ("CHECKS",)

AWAY = 10.0
"""Seconds within which a broker that is away is said to be."""

PUBLISHERS = 100
"""Tasks that publish while the broker is restarted."""


def stores(capabilities: Capabilities) -> bool:
    """Need a broker that keeps what it has confirmed."""
    return capabilities.confirm == "stored" and capabilities.settle != "none"


def stores_retries(capabilities: Capabilities) -> bool:
    """Need a broker that keeps what is postponed."""
    return stores(capabilities) and capabilities.retry > 0


def has_queues(capabilities: Capabilities) -> bool:
    """Need groups that somebody could delete."""
    return capabilities.groups and capabilities.settle != "none"


def buries(capabilities: Capabilities) -> bool:
    """Need a broker that keeps what is dead, in a place that somebody could delete."""
    return capabilities.dead and not capabilities.local


async def _aged(bench: Bench) -> None:
    await anyio.sleep(broker_of(bench).age)


async def _settled(bench: Bench, topic: str, count: int, *, within: float) -> list[str]:
    """Return the ids of so many messages, with new transports for as long as the broker needs."""
    got: list[str] = []
    with anyio.move_on_after(within):
        while len(set(got)) < count:
            try:
                async with bench.make() as transport:
                    desk = Desk(bench, transport, topic)
                    await transport.declare(topic, ["a"])
                    async with desk.subscribe() as subscription:
                        while len(set(got)) < count:
                            delivery = await subscription.receive()
                            got.append(delivery.wire.id)
                            await delivery.ack()
            except TransportError:
                await anyio.sleep(0.1)
    return got


async def away(bench: Bench) -> None:
    """Say Lost within ten seconds when the broker is away, to who receives, to who publishes and to who opens."""
    broker = broker_of(bench)
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        await broker.stop()
        try:
            await is_lost(subscription, AWAY)
            for publishing in (True, False) if desk.transport.capabilities.confirm != "none" else (False,):
                start = current_time()
                try:
                    with anyio.fail_after(AWAY + 5.0):
                        if publishing:
                            await desk.publish(letters(1))
                        else:
                            async with bench.make():
                                pass
                except TransportError as error:
                    require(is_loss(error), f"it should be Lost, not {error!r}")
                else:
                    raise AssertionError("nothing was said")
                waited = current_time() - start
                require(waited <= AWAY, f"it was said after {waited:.1f} s")
        finally:
            await broker.start()


async def confirmed(bench: Bench) -> None:
    """Keep through a kill of the broker what publish has returned for."""
    sent = letters(50)
    async with opened(bench, "a") as desk:
        await _aged(bench)
        await desk.publish(sent)
        await broker_of(bench).kill()
    await broker_of(bench).start()
    got = await _settled(bench, desk.topic, len(sent), within=10 * bench.patience)
    require({wire.id for wire in sent} <= set(got), f"{len(set(got))} of {len(sent)} survived")


async def postponed(bench: Bench) -> None:
    """Keep through a restart of the broker what is postponed."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        after = min(max(3.0, desk.transport.capabilities.grain), desk.transport.capabilities.retry)
        await desk.publish(letters(1))
        for last in (False, True):  # the first time makes the places where it waits, and they must have aged too
            [delivery] = await desk.take(subscription, 1)
            await delivery.retry(after)
            if not last:
                await _aged(bench)
        await broker_of(bench).stop()
    await broker_of(bench).start()
    got = await _settled(bench, desk.topic, 1, within=after + 10 * bench.patience)
    require(got == [delivery.wire.id], f"it came back as {got}")


class _Office:
    """Publish and consume through a broker that goes away and comes back, as a worker does."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.topic = f"exam.{new_id()}"
        self.got: set[str] = set()
        self.lives = 0
        self.losses = 0
        self.unkind: list[TransportError] = []
        self._desk: Desk | None = None
        self._life = anyio.CancelScope()

    def lives_on(self, count: int) -> bool:
        """Tell whether so many lives have begun, and the last has not ended."""
        return self.lives >= count and self._desk is not None

    def has(self, count: int) -> bool:
        """Tell whether so many have arrived."""
        return len(self.got) >= count

    async def work(self) -> None:
        """Open, consume and ack, and again after every loss."""
        while True:
            try:
                async with self.bench.make() as transport:
                    await transport.declare(self.topic, ["a"])
                    desk = Desk(self.bench, transport, self.topic)
                    async with desk.subscribe() as subscription:
                        self._desk, self.lives = desk, self.lives + 1
                        with anyio.CancelScope() as self._life:
                            await self._consume(subscription)
            except TransportError as error:
                self._note(error)
            await anyio.sleep(0.1)

    async def _consume(self, subscription: Subscription) -> None:
        while True:
            try:
                delivery = await subscription.receive()
            except Lost:
                self._end()
                raise
            self.got.add(delivery.wire.id)
            with suppress(SettleError):  # whether it was settled is not known: maybe it comes again
                await delivery.ack()

    async def _probe(self, desk: Desk) -> None:
        """End the life of a transport that cannot even declare, as the worker does when a publish is lost."""
        try:
            await desk.transport.declare(self.topic, ["a"])
        except TransportError as error:
            self._note(error)
            if desk is self._desk:
                self._end()
                self._life.cancel()

    def _end(self) -> None:
        """Count the end of a life, once."""
        self.losses += self._desk is not None
        self._desk = None

    async def publish(self, wires: Sequence[Wire]) -> None:
        """Publish one by one, each until it is confirmed."""
        for wire in wires:
            done = False
            while not done:
                desk = self._desk
                try:
                    if desk is not None:
                        await desk.publish([wire])
                        done = True
                except TransportError as error:
                    self._note(error)
                    if desk is not None:
                        await self._probe(desk)
                if not done:
                    await anyio.sleep(0.05)

    def _note(self, error: TransportError) -> None:
        if not is_loss(error):
            self.unkind.append(error)


async def restarted(bench: Bench) -> None:
    """Bring everything that was confirmed through two restarts of the broker under load, told by one Lost each.

    Where membership in the group is the lease a client may outlive a short absence of its broker, and is not told.
    """
    broker, office = broker_of(bench), _Office(bench)
    sent = letters(broker.count)
    expected = 1 if bench.make().capabilities.returns == "rebalance" else 3
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(office.work)
        await until(lambda: office.lives == 1, 4 * bench.patience, "it did not open")
        await _aged(bench)
        async with anyio.create_task_group() as publishers:
            for number in range(PUBLISHERS):
                publishers.start_soon(office.publish, sent[number::PUBLISHERS])
            for third, end in ((1, broker.stop), (2, broker.kill)):
                await until(partial(office.has, third * len(sent) // 3), AWAY * bench.patience, "no progress")
                await until(partial(office.lives_on, min(third, expected)), AWAY * bench.patience, "it never came back")
                await end()
                await broker.start()
        with anyio.move_on_after(AWAY * bench.patience):
            while not (office.has(len(sent)) and office.lives == max(office.losses + 1, expected)):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    require(not office.unkind, f"it should all be Lost: {office.unkind[:1]}")
    lives = f"{office.lives} lives that ended {office.losses} x in Lost"
    require(office.has(len(sent)), f"only {len(office.got)} of {len(sent)} arrived in {lives}")
    require(office.got == {wire.id for wire in sent}, "something arrived that nobody sent")
    require(office.lives == office.losses + 1 >= expected, lives)


async def deleted(bench: Bench) -> None:
    """Say Lost within five seconds when the queue, stream or group is deleted, and heal by subscribing again."""
    async with opened(bench, "a") as desk:
        async with desk.subscribe() as subscription:
            first = letters(1)
            await desk.publish(first)
            await desk.clear(subscription, 1)
            await broker_of(bench).delete(desk.topic, "a")
            await is_lost(subscription, 5.0)
        await desk.transport.declare(desk.topic, ["a"])
        missing = letters(3)
        known = {wire.id for wire in [*first, *missing]}  # a log gives a new group what the old one had settled
        async with desk.subscribe() as subscription:
            await desk.publish(missing)
            while missing:
                [id] = await desk.clear(subscription, 1)
                require(id in known, "something arrived that nobody sent")
                missing = [wire for wire in missing if wire.id != id]


async def unburied(bench: Bench) -> None:
    """Bring back what was rejected when its dead copy could not be kept."""
    async with opened(bench, "a") as desk, desk.subscribe() as subscription:
        await desk.publish(letters(1))
        [delivery] = await desk.take(subscription, 1)
        await broker_of(bench).delete_dead(desk.topic, "a")
        with suppress(TransportError):
            await delivery.reject("card stolen")
            raise AssertionError("it was rejected, and nothing keeps the dead")
    got = await _settled(bench, desk.topic, 1, within=bench.lease + 4 * bench.patience)
    require(got == [delivery.wire.id], f"it came back as {got}")


CHECKS = (
    Check(9, is_remote, away),
    Check(10, stores, confirmed),
    Check(31, stores_retries, postponed),
    Check(33, buries, unburied),
    Check(45, stores, restarted),
    Check(46, has_queues, deleted),
)
