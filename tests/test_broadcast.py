"""Live streams across processes: once each, in order, bounded, told of what is missing, and no burden to publishers.

A process is a bus of its own here, with a transport object of its own. ``CARRIERS`` says how the transports of one
group of processes are made: a broker that broadcasts is one entry more.
"""

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Event, EventBus, Gap, Limits, Module, WiringError, WrongLoopError
from eventbus.broadcast import HEADER, Broadcast, Follower, live_topic
from eventbus.errors import Lost, PublishError
from eventbus.live import Stream
from eventbus.stores.memory import MemoryStore
from eventbus.testing.harness import harness
from eventbus.transport import Delivery, Subscription, Transport, Wire
from eventbus.transports.memory import MemoryTransport

Make = Callable[[], Transport]
"""Makes the transport of one more process."""


class Moved(Event, name="b.moved"):
    """State that something moved."""

    number: float = 0


class MovedFast(Moved, name="b.moved_fast"):
    """State that it moved fast."""


class Stopped(Event, name="b.stopped"):
    """State that it stopped."""

    number: float = 0


class Unknown(Event, name="b.unknown"):
    """Be an event that no module lists."""


class Port:
    """Be one process's link to a hub in memory; it can be slow, down, or cut."""

    def __init__(self, hub: MemoryTransport, **promises: Any) -> None:
        self.hub = hub
        self.capabilities = replace(hub.capabilities, **{"local": False, "unheard": "lost", **promises})
        self.down = False
        self.gate: anyio.Event | None = None
        self.ears: list[Ear] = []
        self.published: list[tuple[str, list[Wire]]] = []
        self.left: list[str] = []
        """Topics whose subscription was left in peace."""

    def _check(self) -> None:
        if self.down:
            raise Lost("the hub is away")

    async def __aenter__(self) -> Self:
        self._check()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cut()

    async def declare(self, topic: str, groups: Any, *, ordered: Any = ()) -> None:
        """Declare it."""
        self._check()
        await self.hub.declare(topic, groups)

    async def publish(self, topic: str, wires: Any) -> None:
        """Publish, through the gate if there is one."""
        if self.gate is not None:
            await self.gate.wait()
        if self.down:
            raise PublishError(dict.fromkeys(range(len(wires)), Lost("the hub is away")))
        self.published.append((topic, list(wires)))
        try:
            await self.hub.publish(topic, wires)
        except PublishError:
            if self.capabilities.unheard == "refused":
                raise

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncIterator[Subscription]:
        """Subscribe, until the link is cut."""
        self._check()
        async with self.hub.subscribe(topic, group=group, prefetch=prefetch, lease=lease) as subscription:
            ear = Ear(topic, subscription)
            self.ears.append(ear)
            try:
                yield ear
                await checkpoint()
                self.left.append(topic)
            finally:
                self.ears.remove(ear)

    @property
    def heard(self) -> list[str]:
        """Return the topics that are subscribed to."""
        return sorted(ear.topic for ear in self.ears)

    def cut(self) -> None:
        """Break every subscription."""
        for ear in self.ears:
            ear.cut = True
            ear.scope.cancel()


class Ear:
    """Be a subscription that can be cut."""

    def __init__(self, topic: str, subscription: Subscription) -> None:
        self.topic = topic
        self.subscription = subscription
        self.cut = False
        self.scope = anyio.CancelScope()

    async def receive(self) -> Delivery:
        """Return the next delivery."""
        with anyio.CancelScope() as self.scope:
            if not self.cut:
                return await self.subscription.receive()
        raise Lost("the link was cut")

    async def stop(self) -> None:
        """Take nothing more in."""
        await self.subscription.stop()


@asynccontextmanager
async def memory(**promises: Any) -> AsyncIterator[Make]:
    """Connect processes by a hub in this one."""
    async with MemoryTransport() as hub:
        yield lambda: Port(hub, **promises)


CARRIERS: dict[str, Callable[[], AbstractAsyncContextManager[Make]]] = {
    "memory": memory,
    "memory, no bytes": lambda: memory(local=True),
    "memory, no headers": lambda: memory(headers=False),
    "memory, by key": lambda: memory(order="key"),
    "memory, refusing": lambda: memory(unheard="refused"),
}


@pytest.fixture(params=CARRIERS)
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Return what makes the transports of one group of processes."""
    async with CARRIERS[request.param]() as make:
        yield make


@pytest.fixture
async def hub() -> AsyncIterator[MemoryTransport]:
    """Return a hub for ports that are troubled."""
    async with MemoryTransport() as hub:
        yield hub


def process(transport: Transport, name: str = "b", **arguments: Any) -> EventBus:
    """Return the bus of one process."""
    module = Module("m", messages=[Moved, MovedFast, Stopped])
    return EventBus(module, name=name, transports={"push": transport}, live="push", **arguments)


def broadcast(bus: EventBus) -> Broadcast:
    """Return what carries the live events of a bus."""
    found = bus.engine.broadcast
    assert found is not None
    return found


async def take(stream: Stream[Any], count: int) -> list[Any]:
    """Take so many from a stream."""
    with anyio.fail_after(10):
        return [await anext(stream) for _ in range(count)]


async def nothing_left(stream: Stream[Any]) -> bool:
    """Tell whether a stream is empty once nothing moves any more."""
    await anyio.wait_all_tasks_blocked()
    with anyio.move_on_after(0.001) as scope:
        await anext(stream)
    return scope.cancelled_caught


async def until(true: Callable[[], object]) -> None:
    """Wait until something is true that no event tells of."""
    with anyio.fail_after(10):
        while not true():
            await checkpoint()


# On every carrier.


async def test_streams_of_all_processes_get_what_any_publishes(make: Make) -> None:
    """Every process's streams get every event once, those of each process in their order, its own not twice."""
    here, there = process(make()), process(make())
    async with here.running(), there.running(), here.stream(Moved) as near, there.stream(Moved) as far:
        for number in range(3):
            await here.publish(Moved(number=number))
        assert [Moved(number=0), Moved(number=1), Moved(number=2)] == await take(far, 3)
        await there.publish(Moved(number=3))
        expected = [Moved(number=number) for number in range(4)]
        assert expected == await take(near, 4)
        assert [Moved(number=3)] == await take(far, 1)
        assert await nothing_left(near)
        assert await nothing_left(far)


async def test_many_events_keep_their_order(make: Make) -> None:
    """A burst arrives complete and in order, also when two types take turns."""
    here, there = process(make()), process(make())
    async with here.running(), there.running(), there.stream(Moved, buffer=1_000) as far:
        await here.publish_many([Stopped() if number % 50 == 49 else Moved(number=number) for number in range(300)])
        expected = [number for number in range(300) if number % 50 != 49]
        assert expected == [event.number for event in await take(far, len(expected))]


async def test_process_that_only_publishes(make: Make) -> None:
    """A process without streams, also one that does not consume, is heard in the others."""
    here, there = process(make()), process(make())
    async with there.running(consume=False), there.stream(Moved) as far, here.running(consume=False):
        await here.publish(Moved(number=1))
        assert [Moved(number=1)] == await take(far, 1)


async def test_what_was_published_at_the_end_gets_out(make: Make) -> None:
    """A process may publish and leave at once: stopping gives what waits a moment to get out."""
    here, there = process(make()), process(make())
    async with there.running(), there.stream(Moved) as far:
        async with here.running():
            await here.publish(Moved(number=1))
        assert [Moved(number=1)] == await take(far, 1)


async def test_stopping_waits_for_a_slow_transport(hub: MemoryTransport) -> None:
    """What is on its way when the bus stops still gets out, if that does not take long."""
    port = Port(hub)
    here, there = process(port), process(Port(hub))

    async def unblock(gate: anyio.Event) -> None:
        await until(lambda: here.engine.state == "stopping")
        await anyio.wait_all_tasks_blocked()
        gate.set()

    async with there.running(), there.stream(Moved) as far, anyio.create_task_group() as group:
        port.gate = anyio.Event()
        group.start_soon(unblock, port.gate)
        async with here.running():
            await here.publish(Moved(number=1))
            await here.publish(Stopped())
            await here.publish(Moved(number=2))
        assert [Moved(number=1), Moved(number=2)] == await take(far, 2)


async def test_next_life_counts_anew(make: Make) -> None:
    """A process that starts again is a new one to the others: nothing is missing, nothing a duplicate."""
    here, there = process(make()), process(make())
    async with there.running(), there.stream(Moved) as far:
        for life in range(2):
            async with here.running():
                await here.publish(Moved(number=life))
                assert [Moved(number=life)] == await take(far, 1)


async def test_base_class_and_several_types(make: Make) -> None:
    """A stream of a base class gets the registered types below it from everywhere, and no others."""
    here, there = process(make()), process(make())
    async with here.running(), there.running(), there.stream(Moved) as moved, there.stream(Stopped, MovedFast) as two:
        await here.publish(Stopped())
        await here.publish(MovedFast(number=1))
        assert [MovedFast(number=1)] == await take(moved, 1)
        assert {Stopped, MovedFast} == {type(event) for event in await take(two, 2)}


async def test_other_buses_hear_nothing(make: Make) -> None:
    """Live events stay among the processes of one bus name."""
    here, other = process(make()), process(make(), "c")
    async with here.running(), other.running(), here.stream(Moved) as near, other.stream(Moved) as far:
        await here.publish(Moved(number=1))
        assert [Moved(number=1)] == await take(near, 1)
        assert await nothing_left(far)


async def test_after_commit_only(make: Make) -> None:
    """Other processes hear of an event after its commit, and never of one that was rolled back."""
    here, there = process(make(), store=MemoryStore()), process(make())
    async with here.running(), there.running(), there.stream(Moved) as far:
        with pytest.raises(KeyError):
            async with here.transaction():
                await here.publish(Moved(number=1))
                raise KeyError
        async with here.transaction():
            await here.publish(Moved(number=2))
            assert await nothing_left(far)
        assert [Moved(number=2)] == await take(far, 1)


# Subscribing no more than is wanted.


async def test_only_what_a_stream_wants_is_subscribed_to(hub: MemoryTransport) -> None:
    """The first stream of a type subscribes, the last that closes leaves; nothing else does."""
    port = Port(hub)
    bus = process(port)
    moved = [live_topic("b", name) for name in ("b.moved", "b.moved_fast")]
    async with bus.running():
        assert [] == port.heard
        async with bus.stream(Moved):
            assert moved == port.heard
            async with bus.stream(MovedFast):
                assert moved == port.heard
            await anyio.wait_all_tasks_blocked()
            assert moved == port.heard
        await until(lambda: not port.heard)
        assert [] == [*broadcast(bus)]
        async with bus.stream(Stopped):
            assert [live_topic("b", "b.stopped")] == port.heard
    assert [] == port.heard


async def test_subscriptions_are_left_in_peace(hub: MemoryTransport) -> None:
    """Whether its last stream closes or the bus stops, a subscription is not cancelled while it is being left."""
    port = Port(hub)
    bus, stopped, moved = process(port), live_topic("b", "b.stopped"), live_topic("b", "b.moved_fast")
    async with bus.running():
        async with bus.stream(Stopped):
            pass
        await until(lambda: not port.heard)
        assert [stopped] == port.left
        opening = bus.stream(MovedFast)
        await opening.__aenter__()
    assert [stopped, moved] == port.left
    async with bus.running(), bus.stream(MovedFast):
        await opening.__aexit__(None, None, None)
        assert [moved] == port.heard
        await bus.publish(Stopped())


@pytest.mark.parametrize(("order", "sizes"), [("none", [1, 32, 7]), ("key", [1] * 40)])
async def test_events_go_out_together(hub: MemoryTransport, order: str, sizes: list[int]) -> None:
    """What waits goes out in batches without a key; where a key is the order, each alone, by its process."""
    port = Port(hub, order=order)
    async with process(port).running() as bus:
        port.gate = anyio.Event()
        for number in range(40):
            await bus.publish(Moved(number=number))
            await anyio.wait_all_tasks_blocked()
        assert 40 == bus.engine.outstanding()
        port.gate.set()
        await until(lambda: not broadcast(bus).outstanding())
        assert sizes == [len(wires) for _, wires in port.published]
        keys = {wire.key for _, wires in port.published for wire in wires}
        assert keys == ({None} if order == "none" else {broadcast(bus).process})


async def test_stream_that_could_hear_nothing(hub: MemoryTransport) -> None:
    """A type that the bus could not read from the wire is refused, and named with the cure."""
    async with process(Port(hub)).running() as bus:
        with pytest.raises(ValueError, match=r"messages=\[Unknown\]"):
            async with bus.stream(Moved, Unknown):
                pass
        assert [] == [*broadcast(bus)]


async def test_unregistered_event_stays_at_home(hub: MemoryTransport) -> None:
    """What nobody registered is published as ever, and does not go out."""
    port = Port(hub)
    async with process(port).running() as bus:
        await bus.publish(Unknown())
        await bus.publish(Moved())
        await until(lambda: port.published)
        assert [live_topic("b", "b.moved")] == [topic for topic, _ in port.published]


async def test_consumers_of_the_message_get_no_copies(hub: MemoryTransport) -> None:
    """A transport may carry messages and live events: a handler gets its message once."""
    module, seen = Module("m"), list[Moved]()

    @module.on(Moved)
    async def moved(event: Moved) -> None:
        seen.append(event)

    bus = EventBus(module, name="b", transports={"push": Port(hub)}, routes={Moved: "push"}, live="push")
    async with bus.running(), bus.stream(Moved) as stream:
        await bus.publish(Moved(number=1))
        assert [Moved(number=1)] == await take(stream, 1)
        await until(lambda: seen)
        await anyio.wait_all_tasks_blocked()
    assert [Moved(number=1)] == seen


# Trouble.


async def test_slow_transport_costs_a_counted_gap(hub: MemoryTransport) -> None:
    """Publishers never wait: beyond Limits.queue the oldest give way, and readers are told how many."""
    port = Port(hub)
    here, there = process(port, limits=Limits(queue=3)), process(Port(hub))
    async with here.running(), there.running(), here.stream(Moved) as near, there.stream(Moved) as far:
        port.gate = anyio.Event()
        for number in range(9):
            await here.publish(Moved(number=number))
            await anyio.wait_all_tasks_blocked()
        assert 9 == len(await take(near, 9))
        assert 5 == broadcast(here).dropped
        port.gate.set()
        assert [0, Gap(5), 6, 7, 8] == [getattr(item, "number", item) for item in await take(far, 5)]


async def test_lost_link_is_subscribed_again_and_told(hub: MemoryTransport) -> None:
    """After a loss the link is opened anew; readers see a gap at once, and how large it was at the next event."""
    port = Port(hub)
    here, there = process(Port(hub)), process(port)
    async with here.running(), there.running(), there.stream(Stopped) as far:
        await here.publish(Stopped(number=0))
        assert [Stopped(number=0)] == await take(far, 1)
        port.down = True
        port.cut()
        await until(lambda: not there.health().healthy)
        for number in (1, 2):
            await here.publish(Stopped(number=number))
        await there.publish(Stopped(number=7))
        assert [Stopped(number=7)] == await take(far, 1)
        await until(lambda: not broadcast(here).outstanding())
        port.down = False
        assert [Gap(0)] == await take(far, 1)
        await until(lambda: there.health().healthy)
        await here.publish(Stopped(number=3))
        assert [Gap(2), Stopped(number=3)] == await take(far, 2)


async def test_stream_opened_while_the_link_is_down(hub: MemoryTransport) -> None:
    """Such a stream opens without waiting, has what is published here, and a gap once the others are heard."""
    port = Port(hub)
    port.down = True
    here, there = process(Port(hub)), process(port)
    async with here.running(), there.running(), there.stream(Stopped) as far:
        await there.publish(Stopped(number=1))
        assert [Stopped(number=1)] == await take(far, 1)
        port.down = False
        assert [Gap(0)] == await take(far, 1)
        await here.publish(Stopped(number=2))
        assert [Stopped(number=2)] == await take(far, 1)


async def test_disconnected_when_events_of_others_are_missing(hub: MemoryTransport) -> None:
    """With slow="disconnect" a gap in the link ends the stream by an error, at this read and every later one."""
    port = Port(hub)
    async with process(port).running() as bus, bus.stream(Moved, slow="disconnect") as stream:
        port.cut()
        for _ in range(2):
            with pytest.raises(Lost, match=r"stream\(Moved\) has missed"), anyio.fail_after(10):
                await anext(stream)


async def test_transport_that_is_away_is_no_trouble_of_publishers(
    hub: MemoryTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """While nothing gets out publishing goes on; what waited longer than Limits.connect is dropped and counted."""
    port = Port(hub)
    here, there = process(port, limits=Limits(connect=0.05)), process(Port(hub))
    async with here.running(), there.running(), there.stream(Moved) as far:
        await here.publish(Moved(number=0))
        assert [Moved(number=0)] == await take(far, 1)
        port.down = True
        with caplog.at_level(logging.WARNING, "eventbus"):
            for number in range(1, 4):
                await here.publish(Moved(number=number))
            await until(lambda: broadcast(here).dropped == 3)
        assert 1 == sum("do not get out" in record.message for record in caplog.records)
        port.down = False
        await until(lambda: here.health().healthy)
        await here.publish(Moved(number=4))
        assert [Gap(3), Moved(number=4)] == await take(far, 2)
        assert "3 were dropped" in caplog.text


async def test_nothing_waits_for_long(hub: MemoryTransport) -> None:
    """What was published before the transport came up at last is not told when it is old."""
    port = Port(hub)
    port.down = True
    here, there = process(port, limits=Limits(connect=0.02)), process(Port(hub))
    async with here.running(), there.running(), there.stream(Moved) as far:
        await here.publish(Moved(number=1))
        await until(lambda: not broadcast(here).outstanding())
        assert 1 == broadcast(here).dropped
        port.down = False
        await until(lambda: here.health().healthy)
        await here.publish(Moved(number=2))
        assert [Moved(number=2)] == await take(far, 1)


async def test_nobody_listens(hub: MemoryTransport, caplog: pytest.LogCaptureFixture) -> None:
    """That no process listens is no trouble, also where the transport says so."""
    async with process(Port(hub, unheard="refused")).running() as bus:
        for _ in range(3):
            await bus.publish(Moved())
        await until(lambda: not broadcast(bus).outstanding())
        assert 0 == broadcast(bus).dropped
    assert "" == caplog.text


async def test_adapter_that_fails_is_survived(hub: MemoryTransport, caplog: pytest.LogCaptureFixture) -> None:
    """A bug of the transport costs the events it struck, and nothing after them."""
    port = Port(hub)
    here, there = process(port), process(Port(hub))
    working, port.publish = port.publish, None  # type: ignore[assignment,method-assign]
    async with here.running(), there.running(), there.stream(Moved) as far:
        await here.publish(Moved(number=1))
        await until(lambda: broadcast(here).dropped == 1)
        port.publish = working  # type: ignore[method-assign]
        await here.publish(Moved(number=2))
        assert [Moved(number=2)] == await take(far, 1)
    assert "publishing b.live.b.moved failed" in caplog.text


async def test_event_that_cannot_be_written(hub: MemoryTransport) -> None:
    """An event that no JSON can hold is published here, and is a gap elsewhere."""
    here, there = process(Port(hub)), process(Port(hub))
    async with here.running(), there.running(), there.stream(Moved) as far:
        for number in (1.0, float("inf"), 3.0):
            await here.publish(Moved(number=number))
        assert [Moved(number=1), Gap(1), Moved(number=3)] == await take(far, 3)


async def test_event_that_cannot_be_read(hub: MemoryTransport) -> None:
    """Newer versions, as while a deploy rolls, and garbage are gaps to those who cannot read them."""

    class Newer(Event, name="b.moved", version=2):
        number: float = 0

    newer = EventBus(Module("m", messages=[Newer]), name="b", transports={"push": Port(hub)}, live="push")
    async with newer.running(), process(Port(hub)).running() as bus, bus.stream(Moved) as stream:
        await newer.publish(Newer())
        assert [Gap(1)] == await take(stream, 1)
        await hub.publish(live_topic("b", "b.moved"), [Wire("x", b"garbage")])
        assert [Gap(1)] == await take(stream, 1)
        await bus.publish(Moved(number=1))
        assert [Moved(number=1)] == await take(stream, 1)


# One follower.


@dataclass
class Heard:
    """Hold a follower, its stream, and what makes wires of other processes."""

    follower: Follower
    stream: Stream[Any]

    def hear(self, header: str, number: float = 0) -> None:
        """Hear an event whose header says who is its process, and which event it is."""
        body = f'{{"number":{number}}}'.encode()
        facts = {"specversion": "1.0", "id": "1", "type": "b.moved", "source": "b", "time": "2030-01-02T03:04:05Z"}
        headers = {f"ce-{name}": value for name, value in facts.items()}
        self.follower.take(Wire("1", body, {**headers, "content-type": "application/json", HEADER: header}))


@pytest.fixture
async def heard(hub: MemoryTransport) -> AsyncIterator[Heard]:
    """Return a follower whose stream is open."""
    async with process(Port(hub)).running() as bus, bus.stream(Moved, MovedFast, buffer=3_000) as stream:
        yield Heard(next(one for one in broadcast(bus) if one.type is Moved), stream)


async def test_numbers_tell_gaps_and_duplicates(heard: Heard) -> None:
    """A first number is where it begins; then a missing one is a gap, one that comes again is dropped, per process."""
    for header in ("p 5", "q 1", "p 6", "p 6", "p 5", "p 9", "q 2", "q 4"):
        heard.hear(header, float(header[2:]))
    items = await take(heard.stream, 8)
    assert [5, 1, 6, Gap(2), 9, 2, Gap(1), 4] == [getattr(item, "number", item) for item in items]
    assert await nothing_left(heard.stream)


@pytest.mark.parametrize("header", ["", "p", "p x", "p -1", "p ²", "p " + "9" * 40])
async def test_number_that_is_none(heard: Heard, header: str) -> None:
    """An event that is not numbered in our way comes as it is."""
    for _ in range(2):
        heard.hear(header)
    assert [Moved(), Moved()] == await take(heard.stream, 2)


async def test_processes_that_are_remembered(heard: Heard) -> None:
    """However many processes come and go, a thousand are remembered, those that spoke last."""
    heard.hear("old 1")
    heard.hear("kept 1")
    for number in range(998):
        heard.hear(f"p{number} 1")
    heard.hear("kept 2")
    heard.hear("one-more 1")
    heard.hear("old 9")
    heard.hear("kept 9")
    items = await take(heard.stream, 1_005)
    assert [Gap(6)] == [item for item in items if isinstance(item, Gap)]


# Around it.


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"live": "store", "store": "memory://"}, "live='store': a store gives a message to one process"),
        ({"live": "memory"}, "live='memory' never leaves this process"),
        ({"live": "inline"}, "live='inline' never leaves this process"),
        ({"live": "pull"}, "live='pull' is no transport of this bus"),
        ({"live": "queue"}, "live='queue' gives a message to one process"),
        ({"live": "push", "name": None}, "the bus needs a name"),
    ],
    ids=str,
)
def test_live_that_cannot_be(arguments: dict[str, Any], sentence: str) -> None:
    """A transport that is not there, or does not reach every process, is a fault at start-up."""
    push, queue = MemoryTransport(), MemoryTransport()
    queue.capabilities = replace(queue.capabilities, broadcast=False)
    bus = EventBus(**{"name": "b", "transports": {"push": push, "queue": queue}, **arguments})
    with pytest.raises(WiringError) as caught:
        bus.compile()
    (fault,) = caught.value.faults
    assert sentence in fault


def test_body_that_cannot_travel() -> None:
    """With live= every registered event goes out, so each must be able to."""

    class Locked(Event, name="b.locked", arbitrary_types_allowed=True):
        lock: threading.Event

    transports = {"push": MemoryTransport()}
    EventBus(Module("m", messages=[Locked]), name="b", transports=transports).compile()
    with pytest.raises(WiringError, match="event Locked goes out through live='push', but its body cannot travel"):
        EventBus(Module("m", messages=[Locked]), name="b", transports=transports, live="push").compile()


async def test_test_kit_settles_live_events_too() -> None:
    """Under the harness what goes out is settled like the rest; the bus's own echo is dropped."""
    async with harness(process(MemoryTransport())) as t, t.bus.stream(Moved) as stream:
        await t.publish(Moved(number=1))
        await t.settled()
        assert [Moved(number=1)] == await take(stream, 1)
        assert await nothing_left(stream)
        assert 0 == broadcast(t.bus).outstanding() == broadcast(t.bus).dropped


async def test_publisher_in_another_thread(hub: MemoryTransport, anyio_backend_name: str) -> None:
    """An event that goes out cannot be published from another event loop; one that stays can."""
    errors = list[BaseException]()

    def elsewhere(event: object) -> None:
        try:
            anyio.run(bus.publish, event, backend=anyio_backend_name)
        except WrongLoopError as error:
            errors.append(error)

    async with process(Port(hub)).running() as bus:
        await anyio.to_thread.run_sync(elsewhere, Unknown())
        assert [] == errors
        await anyio.to_thread.run_sync(elsewhere, Moved())
        assert "live= carries" in str(errors[0])


async def test_without_a_lifetime(hub: MemoryTransport) -> None:
    """Inline publishing works without a running bus, and then nothing goes out."""
    port = Port(hub)
    bus = process(port)
    await bus.publish(Moved())
    async with bus.running():
        await bus.publish(Moved(number=1))
    await bus.publish(Moved())
    assert 0 == broadcast(bus).outstanding()
    assert [b'{"number":1.0}'] == [wire.body for _, wires in port.published for wire in wires]


async def test_health_names_what_is_followed(hub: MemoryTransport) -> None:
    """Health tells whether the live transport is open, and every type that is followed."""
    async with process(Port(hub)).running() as bus, bus.stream(Stopped):
        health = bus.health()
        assert health.healthy
        assert {"push": True} == health.transports
        assert health.sources[live_topic("b", "b.stopped")].connected
