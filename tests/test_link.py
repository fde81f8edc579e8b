"""Links: a transport is kept open with back-off, and everybody else waits, publishes and subscribes through it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Limits, Lost, PublishError, Refused, TransportError
from eventbus.clock import Runtime
from eventbus.link import PAUSES, Backoff, Link, Outage
from eventbus.testing.clock import VirtualClock
from eventbus.transport import Wire
from tests.doubles import Flaky, at, raised

WIRE = Wire("1", b"{}")
GROUPS = {"t": ("g",)}


async def turns(count: int = 20) -> None:
    """Let everybody else go on until they wait for something."""
    for _ in range(count):
        await checkpoint()


class Bench:
    """Hold a link, kept, on a clock that stands still."""

    def __init__(self, transport: Flaky, seed: int = 0) -> None:
        self.transport = transport
        self.clock = VirtualClock()
        self.link = Link("flaky", transport, Runtime(self.clock, random=Random(seed)), Limits(connect=5.0))
        self.link.topics = dict(GROUPS)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator["Bench"]:
        """Keep the link for a while."""
        async with anyio.create_task_group() as group:
            await group.start(self.link.keep)
            yield self
            group.cancel_scope.cancel()

    async def next(self) -> float:
        """Move on to the next timer; return the time it is then."""
        due = self.clock.next_due()
        assert due is not None
        self.clock.jump(due)
        await turns()
        return due


async def test_open_declares_and_publishes() -> None:
    """Once kept the transport is open, its topics are declared, and publishing goes through; then it is closed."""
    transport = Flaky()
    async with Bench(transport).kept() as bench:
        assert bench.link.is_up
        assert GROUPS == {topic: tuple(groups) for topic, groups in transport.topics.items()}
        await bench.link.publish("t", [WIRE])
        assert transport.open == 1
    assert not bench.link.is_up
    assert transport.open == 0
    assert [("publish", "t", "1")] == transport.log


async def test_broker_that_is_away_at_first() -> None:
    """The bus starts without the broker; who waits meanwhile goes on when it comes, whichever attempt that is."""
    transport, came = Flaky(), list[int]()
    transport.trouble["open"] = at(1, 2, 3)

    async def waits(number: int) -> None:
        await bench.link.up()
        came.append(number)

    async with anyio.create_task_group() as group, Bench(transport).kept() as bench:
        assert (False, 1) == (bench.link.is_up, bench.link.backoff.failures)
        for number in range(3):
            group.start_soon(waits, number)
            await turns()
            assert [] == came
            await bench.next()
        assert bench.link.is_up
        assert [0, 1, 2] == sorted(came)


async def test_attempts_back_off_with_jitter_by_seed() -> None:
    """Waits double from 0.1 s to 10 s, less up to half by chance, the same for the same seed."""
    transport = Flaky()
    transport.trouble["open"] = lambda _: Lost("away")
    async with Bench(transport, seed=5).kept() as bench:
        times = [0.0] + [await bench.next() for _ in range(12)]
    chance = Random(5)
    expected = [PAUSES.wait(failure, chance) for failure in range(1, 13)]
    assert expected == pytest.approx([later - earlier for earlier, later in pairwise(times)])
    assert all(5 <= wait <= 10 for wait in expected[8:])
    assert transport.calls["open"] == 13


async def test_declaring_that_is_lost_counts_as_not_open() -> None:
    """A link that breaks while declaring is opened again."""
    transport = Flaky()
    transport.trouble["declare"] = at(1)
    async with Bench(transport).kept() as bench:
        assert (False, 0) == (bench.link.is_up, transport.open)
        await bench.next()
        assert (True, 1) == (bench.link.is_up, transport.open)


async def test_topic_that_is_refused_leaves_the_others_alone() -> None:
    """What the broker refuses to declare is not the trouble of the whole link."""
    transport = Flaky()
    transport.trouble["declare"] = at(1, error=lambda: Refused("no rights"))
    async with Bench(transport).kept() as bench:
        assert bench.link.is_up


async def test_first_opening_that_is_refused_ends_the_start() -> None:
    """Who is not let in hears which transport it is, and why; waiting would not mend it."""
    for error in (Refused("wrong password"), TransportError("wrong password")):
        transport = Flaky()
        transport.trouble["open"] = at(1, error=lambda error=error: error)
        bench = Bench(transport)
        async with anyio.create_task_group() as group:
            with pytest.raises(Refused, match=r"^transport flaky: wrong password$"):
                await group.start(bench.link.keep)
        assert (0, 1) == (transport.open, transport.calls["open"])


async def test_link_that_is_not_let_in_any_more_is_tried_again() -> None:
    """A password that is changed while the link is kept is an outage like others."""
    transport = Flaky()
    async with Bench(transport).kept() as bench:
        transport.trouble = {
            "publish": lambda _: Lost("cut"),
            "declare": at(transport.calls["declare"] + 1),
            "open": at(2, 3, error=lambda: Refused("wrong password")),
        }
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])
        await turns()
        for expected in (False, False, True):
            await bench.next()
            assert expected == bench.link.is_up


async def test_loss_is_mended_again_and_again() -> None:
    """A link that breaks after it was open is opened and declared anew, any number of times."""
    transport = Flaky()
    async with Bench(transport).kept() as bench:
        for life in range(1, 6):
            assert (life, 1, True) == (transport.calls["open"], transport.open, bench.link.is_up)
            transport.trouble = {"publish": lambda _: Lost("cut"), "declare": at(transport.calls["declare"] + 1)}
            with pytest.raises(PublishError):
                await bench.link.publish("t", [WIRE])
            assert not bench.link.is_up
            await turns()
            assert transport.open == 0
            transport.trouble = {}
            await bench.next()
        await bench.link.publish("t", [WIRE])


async def test_link_that_does_not_last_backs_off_further() -> None:
    """Opening is no success by itself: only a link that lasted starts again with a short wait."""
    transport = Flaky()

    async def breaks() -> None:
        transport.trouble = {"publish": lambda _: Lost("cut"), "declare": at(transport.calls["declare"] + 1)}
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])
        await turns()
        transport.trouble = {}

    async with Bench(transport).kept() as bench:
        for failure in range(1, 5):
            await breaks()
            assert bench.link.backoff.failures == failure
            await bench.next()
        bench.clock.jump(bench.clock.monotonic() + 10)
        await breaks()
        assert bench.link.backoff.failures == 1


async def test_first_attempt_that_ends_in_a_bug_says_so() -> None:
    """What is no TransportError ends the start, as itself: waiting would not mend it."""
    transport = Flaky()
    transport.trouble["open"] = at(1, error=lambda: ValueError("bad option"))
    bench = Bench(transport)
    async with anyio.create_task_group() as group:
        with raised(ValueError):
            await group.start(bench.link.keep)


async def test_later_attempt_that_ends_in_a_bug_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """In a bus that runs even a bug of an adapter pauses its destination only."""
    transport = Flaky()
    transport.trouble["open"] = {1: Lost("away"), 2: ValueError("a bug")}.get
    async with Bench(transport).kept() as bench:
        await bench.next()
        assert not bench.link.is_up
        assert "transport flaky failed" in caplog.text
        await bench.next()
        assert bench.link.is_up


async def test_close_that_fails_does_not_keep_it_from_opening() -> None:
    """An error while closing a broken link is one more reason to open it again."""
    transport = Flaky()
    transport.trouble["close"] = at(1, error=lambda: TransportError("half closed"))
    transport.trouble["publish"] = at(1)
    transport.trouble["declare"] = at(2)
    async with Bench(transport).kept() as bench:
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])
        await turns()
        await bench.next()
        assert bench.link.is_up


async def test_publish_waits_for_the_link() -> None:
    """A publish waits for a link that is down, and goes through when it is up in time."""
    transport = Flaky()
    transport.trouble["open"] = at(1, 2)
    async with anyio.create_task_group() as group, Bench(transport).kept() as bench:
        group.start_soon(bench.link.publish, "t", [WIRE])
        await turns()
        assert [] == transport.log
        await bench.next()
        await bench.next()
        assert [("publish", "t", "1")] == transport.log


async def test_publish_does_not_wait_for_ever() -> None:
    """After Limits.connect a publish says Lost, and by what name the link is called."""
    transport, outcome = Flaky(), list[tuple[str, float]]()
    transport.trouble["open"] = lambda _: Lost("away")

    async def publish() -> None:
        try:
            await bench.link.publish("t", [WIRE])
        except Lost as error:
            outcome.append((str(error), bench.clock.monotonic()))

    async with anyio.create_task_group() as group, Bench(transport).kept() as bench:
        group.start_soon(publish)
        await turns()
        while bench.clock.monotonic() < 20:
            await bench.next()
    assert [("transport 'flaky' has not been reachable for 5 s: try later", 5.0)] == outcome


async def test_failed_publish_on_a_live_link_heals_its_topic_only() -> None:
    """A topic that was deleted is declared anew; the link, and all who use it, stay as they are."""
    transport = Flaky()
    transport.trouble["publish"] = at(1)
    async with Bench(transport).kept() as bench:
        transport.topics.clear()
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])
        assert {"t": {"g"}} == transport.topics
        assert (1, True) == (transport.calls["open"], bench.link.is_up)
        await bench.link.publish("t", [WIRE])


async def test_failing_together_asks_the_link_once() -> None:
    """Many publishes that fail at once look after their topic once."""
    transport, gate = Flaky(), anyio.Event()
    transport.trouble["publish"] = lambda _: Lost("cut")

    async def publish() -> None:
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])

    async with anyio.create_task_group() as group, Bench(transport).kept() as bench:
        transport.hooks["declare"] = gate.wait
        before = transport.calls["declare"]
        for _ in range(50):
            group.start_soon(publish)
        await turns()
        assert transport.calls["declare"] == before + 1
        gate.set()


async def test_refused_message_is_not_the_links_fault() -> None:
    """A message that the broker will never take says nothing about the link."""
    transport = Flaky()

    async def refuse() -> None:
        raise PublishError({0: Refused("too large")})

    async with Bench(transport).kept() as bench:
        transport.hooks["publish"] = refuse
        before = transport.calls["declare"]
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])
        assert (before, True) == (transport.calls["declare"], bench.link.is_up)


async def test_probe_that_is_refused_leaves_the_link_up() -> None:
    """When a topic cannot be declared for want of rights, that is its publishers' trouble."""
    transport = Flaky()
    transport.trouble = {"publish": at(1), "declare": at(2, error=lambda: Refused("no rights"))}
    async with Bench(transport).kept() as bench:
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])
        assert bench.link.is_up


async def test_ordered_groups_are_declared_as_such() -> None:
    """A broker hears which groups are ordered at the opening, in a probe and from a subscriber."""
    transport = Flaky()
    bench = Bench(transport)
    bench.link.topics, bench.link.ordered = {"t": ("g", "h"), "u": ("g",)}, {"t": ("h",)}
    async with bench.kept():
        assert {("t", "h")} == transport.ordered
        transport.ordered.clear()
        transport.trouble["publish"] = at(1)
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])
        assert {("t", "h")} == transport.ordered
        async with bench.link.subscribe("u", group="g", prefetch=1, lease=1.0, ordered=True):
            assert {("t", "h"), ("u", "g")} == transport.ordered


async def test_subscribe_declares_and_receives() -> None:
    """A subscription declares its group first, so that a queue deleted meanwhile is there again."""
    transport = Flaky()
    async with Bench(transport).kept() as bench:
        transport.topics.clear()
        transport.queues.clear()
        async with bench.link.subscribe("t", group="g", prefetch=1, lease=1.0, ordered=False) as subscription:
            await bench.link.publish("t", [WIRE])
            assert (await subscription.receive()).wire is WIRE


async def test_subscribe_waits_for_the_link() -> None:
    """A subscription waits for a link that is down, as long as it takes."""
    transport, came = Flaky(), list[str]()
    transport.trouble["open"] = at(1, 2)

    async def subscribe() -> None:
        async with bench.link.subscribe("t", group="g", prefetch=1, lease=1.0, ordered=False):
            came.append("subscribed")

    async with anyio.create_task_group() as group, Bench(transport).kept() as bench:
        group.start_soon(subscribe)
        await bench.next()
        assert [] == came
        await bench.next()
        assert ["subscribed"] == came


async def test_subscribing_finds_out_that_the_link_is_dead() -> None:
    """When not even declaring works, the link is opened again; when only subscribing fails, it is not."""
    transport = Flaky()
    async with Bench(transport).kept() as bench:
        transport.trouble["subscribe"] = at(1)
        with pytest.raises(Lost):
            async with bench.link.subscribe("t", group="g", prefetch=1, lease=1.0, ordered=False):
                pass
        assert (True, 1) == (bench.link.is_up, transport.calls["open"])
        transport.trouble = {"declare": at(transport.calls["declare"] + 1)}
        with pytest.raises(Lost):
            async with bench.link.subscribe("t", group="g", prefetch=1, lease=1.0, ordered=False):
                pass
        assert not bench.link.is_up
        await turns()
        await bench.next()
        assert (True, 2) == (bench.link.is_up, transport.calls["open"])


async def test_errors_of_an_earlier_life_do_not_end_the_next() -> None:
    """A publish that began before the link was mended, and fails after, says nothing about the new one."""
    transport, gate = Flaky(), anyio.Event()

    async def slow() -> None:
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])

    async with anyio.create_task_group() as group, Bench(transport).kept() as bench:
        transport.hooks["publish"] = gate.wait
        group.start_soon(slow)
        await turns()
        transport.hooks, transport.trouble = {}, {"declare": at(transport.calls["declare"] + 1)}
        with pytest.raises(Lost):
            async with bench.link.subscribe("t", group="g", prefetch=1, lease=1.0, ordered=False):
                pass
        await turns()
        await bench.next()
        assert bench.link.is_up
        transport.trouble = {"publish": lambda _: Lost("cut"), "declare": lambda _: Lost("cut")}
        gate.set()
        await turns()
        assert bench.link.is_up


async def test_subscribing_that_fails_late_does_not_end_the_next_life() -> None:
    """A subscription that was declaring when the link broke, and fails when it is mended, ends nobody's link."""
    transport, gate, gated = Flaky(), anyio.Event(), [True]

    async def waits_once() -> None:
        if gated:
            gated.clear()
            await gate.wait()
            raise Lost("too late")

    async def subscribe() -> None:
        with pytest.raises(Lost):
            async with bench.link.subscribe("t", group="g", prefetch=1, lease=1.0, ordered=False):
                pass

    async with anyio.create_task_group() as group, Bench(transport).kept() as bench:
        transport.hooks["declare"] = waits_once
        group.start_soon(subscribe)
        await turns()
        transport.trouble = {"publish": lambda _: Lost("cut"), "declare": at(transport.calls["declare"] + 1)}
        with pytest.raises(PublishError):
            await bench.link.publish("t", [WIRE])
        await turns()
        await bench.next()
        assert (True, 2) == (bench.link.is_up, transport.calls["open"])
        gate.set()
        await turns()
        assert bench.link.is_up


def test_link_serves_one_event_loop_after_another() -> None:
    """A link that was kept in one event loop can be kept in another, also of another kind."""
    transport = Flaky()
    transport.trouble["open"] = at(1, 3, 5)
    bench = Bench(transport)

    async def main() -> None:
        async with bench.kept(), anyio.create_task_group() as group:
            group.start_soon(bench.link.up)
            await turns()
            await bench.next()
            assert bench.link.is_up

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(main, backend=backend)
    assert transport.open == 0


def test_outage_alone() -> None:
    """Whoever fails at once waits for the same moment and counts once; what goes well forgets it."""
    clock = VirtualClock()
    outage = Outage(Runtime(clock, random=Random(0)))
    waits = list[float]()
    for _ in range(9):
        wait = outage.failed()
        assert wait == outage.failed() > 0
        clock.jump(clock.monotonic() + wait / 2)
        assert wait / 2 == pytest.approx(outage.failed())
        clock.jump(clock.monotonic() + wait / 2)
        waits.append(wait)
    assert 0.05 <= waits[0] <= 0.1
    assert 5.0 <= waits[-1] <= 10.0
    outage.over()
    assert 0.05 <= outage.failed() <= 0.1


def test_backoff_alone() -> None:
    """Failures add up; what lasted the longest wait forgets them."""
    clock = VirtualClock()
    backoff = Backoff(Runtime(clock, random=Random(0)))
    assert 0.05 <= backoff.pause() <= 0.1
    for failures in range(1, 4):
        backoff.failed()
        assert backoff.failures == failures
    assert 0.2 <= backoff.pause() <= 0.4
    backoff.opened()
    clock.jump(9.9)
    backoff.failed()
    assert backoff.failures == 4
    backoff.opened()
    clock.jump(20)
    backoff.failed()
    assert backoff.failures == 1
