"""The worker: slots, lanes, parking, leases, mending, and how it ends."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Limits, Lost, Refused, SettleError
from eventbus.channel import Channel, Source
from eventbus.clock import Runtime
from eventbus.delivery import Cut, Done, Postponed, Verdict, settle
from eventbus.link import Link
from eventbus.retry import Again, Dead
from eventbus.testing.clock import VirtualClock
from eventbus.transport import Delivery, Wire
from eventbus.worker import Worker
from tests.doubles import Flaky, at

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])

Script = Callable[[Delivery], Awaitable[Verdict]]


async def turns(count: int = 30) -> None:
    """Let everybody else go on until they wait for something."""
    for _ in range(count):
        await checkpoint()


class Office:
    """Run one source over a flaky transport, on a clock that stands still; ``script`` says what handling does."""

    def __init__(self, transport: Flaky | None = None, *, slots: int = 2, prefetch: int = 10, **options: Any) -> None:
        self.transport = transport or Flaky()
        self.clock = VirtualClock()
        self.started: list[tuple[str, int, float]] = []
        self.script: dict[str, Script] = {}
        self.drain = options.pop("drain", 20.0)
        limits = Limits(drain=self.drain)
        runtime = Runtime(self.clock, random=Random(0))
        self.link = Link("flaky", self.transport, runtime, limits)
        ordered = options.get("ordered", False)
        promises = self.transport.capabilities
        self.source = Source(
            name="t@g",
            subscribe=partial(self.link.subscribe, "t", group="g", prefetch=prefetch, lease=30.0, ordered=ordered),
            attend=self.attend,
            settle=options.pop("settle", settle),
            slots=slots,
            longest=promises.retry,
            lease=30.0 if promises.returns == "lease" else None,
            **options,
        )
        self.worker = Worker([self.source], runtime, limits)

    @property
    def channel(self) -> Channel:
        """The one channel."""
        return self.worker.channels[0]

    @property
    def ids(self) -> list[str]:
        """What was started, in order."""
        return [id for id, _, _ in self.started]

    async def attend(self, delivery: Delivery) -> Verdict:
        """Handle as the script says; without a word it is done."""
        self.started.append((delivery.wire.id, delivery.attempt, self.clock.monotonic()))
        script = self.script.get(delivery.wire.id)
        return Done() if script is None else await script(delivery)

    async def publish(self, *ids: str, key: str | None = None) -> None:
        """Publish so many messages; ``a1`` has the key ``a`` unless another is given."""
        await self.transport.declare("t", ["g"])
        for id in ids:
            await self.transport.publish("t", [Wire(id, b"{}", {}, key or id[0])])
        await turns()

    async def pass_time(self, seconds: float) -> None:
        """Move on, stopping at every due time."""
        target = self.clock.monotonic() + seconds
        await turns()
        while (due := self.clock.next_due()) is not None and due <= target:
            self.clock.jump(due)
            await turns()
        self.clock.jump(target)
        await turns()

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Office"]:
        """Run for a while."""
        async with anyio.create_task_group() as group:
            await group.start(self.link.keep)
            group.start_soon(self.worker.run)
            await turns()
            yield self
            group.cancel_scope.cancel()

    async def ended(self, within: float) -> float:
        """Drain; return the seconds it took, which must be no more than so many."""
        before, over = self.clock.monotonic(), anyio.Event()

        async def drain() -> None:
            await self.worker.drain()
            over.set()

        async with anyio.create_task_group() as group:
            group.start_soon(drain)
            await turns(300)
            while not over.is_set():
                due = self.clock.next_due()
                assert due is not None, "the drain waits for no time"
                assert due <= before + within, "the drain takes too long"
                self.clock.jump(due)
                await turns()
        return self.clock.monotonic() - before


def verdict(*verdicts: Verdict) -> Script:
    """Return a script that gives one verdict after the other, and then that it is done."""
    rest = list(verdicts)

    async def script(delivery: Delivery) -> Verdict:
        return rest.pop(0) if rest else Done()

    return script


def waits(event: anyio.Event, then: Verdict | None = None) -> Script:
    """Return a script that waits for an event."""

    async def script(delivery: Delivery) -> Verdict:
        await event.wait()
        return then or Done()

    return script


def hangs(notes: list[str] | None = None) -> Script:
    """Return a script that never ends by itself."""

    async def script(delivery: Delivery) -> Verdict:
        try:
            await anyio.sleep_forever()
        finally:
            if notes is not None:
                notes.append(delivery.wire.id)
        return Done()

    return script


# slots


async def test_slots_bound_what_runs_at_once() -> None:
    """So many run as there are slots, the others follow as slots come free, all are settled."""
    gate, office = anyio.Event(), Office(slots=3)
    async with office.open():
        for number in range(6):
            office.script[f"m{number}"] = waits(gate)
        await office.publish(*(f"m{number}" for number in range(6)))
        assert ["m0", "m1", "m2"] == sorted(office.ids)
        assert len(office.channel.running) == 3
        gate.set()
        await turns()
        assert len(office.started) == 6
        assert (0, 6, 0) == (len(office.channel.running), office.channel.handled, office.channel.lease_lost)
        assert len(office.transport.settled("ack")) == 6


async def test_slot_goes_on_while_its_settlement_is_on_its_way() -> None:
    """Where settling is not waited for, one slot handles on, until as many as all slots are not settled yet."""
    told: dict[str, Callable[[bool], None]] = {}

    def post(delivery: Delivery, _: Verdict, hear: Callable[[bool], None]) -> None:
        told[delivery.wire.id] = hear

    office, ready = Office(slots=2, post=post), anyio.Event()
    office.script = {"a3": waits(ready)}
    async with office.open():
        await office.publish("a1", "a2", "a3", "a4", "a5")
        assert ["a1", "a2"] == office.ids
        told["a2"](True)
        await turns()
        assert ["a1", "a2", "a3"] == office.ids
        told["a1"](False)
        await turns()
        assert ["a1", "a2", "a3", "a4"] == office.ids
        ready.set()
        await turns()
        assert ["a1", "a2", "a3", "a4"] == office.ids
        assert (2, 1) == (office.channel.handled, office.channel.lease_lost)
        told["a3"](True)
        told["a4"](True)
        await turns()
        assert "a5" == office.ids[-1]


@asyncio_only
async def test_woken_slot_that_is_cancelled_leaves_the_others_to_be_woken() -> None:
    """A slot that a stranger cancels in the moment in which it was woken is not waited for."""
    told: dict[str, Callable[[bool], None]] = {}

    def post(delivery: Delivery, _: Verdict, hear: Callable[[bool], None]) -> None:
        told[delivery.wire.id] = hear

    office = Office(slots=1, post=post)
    async with office.open():
        await office.publish("a1", "a2")
        slot = next(task for task in asyncio.all_tasks() if task.get_name() == "eventbus slot of t@g")
        told["a1"](True)
        slot.cancel()
        await turns()
        told["a2"](True)
        await turns()
        await office.publish("a3")
        assert ["a1", "a2", "a3"] == office.ids


async def test_drain_waits_for_settlements_on_their_way() -> None:
    """What was handled is settled before the drain is over, though every slot is gone."""
    told: list[Callable[[bool], None]] = []
    office = Office(post=lambda delivery, verdict, hear: told.append(hear))
    async with office.open():
        await office.publish("a1")
        office.worker.cut()

        async def hear() -> None:
            await turns(100)
            told[0](True)

        async with anyio.create_task_group() as group:
            group.start_soon(hear)
            await office.worker.drain()
            assert 1 == office.channel.handled


async def test_each_verdict_reaches_the_transport() -> None:
    """Done is acked, death rejected with its reason, a retry within the transport's reach is its own."""
    office = Office(Flaky(retry=60.0))
    office.script = {"b1": verdict(Dead("why")), "c1": verdict(Again(5.0)), "d1": verdict(Postponed(7.0))}
    async with office.open():
        await office.publish("a1", "b1", "c1", "d1")
    log = [entry for entry in office.transport.log if entry[0] != "publish"]
    assert ("ack", "g", "a1") in log
    assert ("reject", "g", "b1", "why") in log
    assert ("retry", "g", "c1", 5.0) in log
    assert ("retry", "g", "d1", 7.0) in log
    assert [1, 2] == [attempt for id, attempt, _ in office.started if id == "c1"]


async def test_never_more_unsettled_than_prefetch() -> None:
    """What is taken in and not settled keeps to the prefetch."""
    gate, office = anyio.Event(), Office(slots=1, prefetch=4)
    office.script = {"m0": waits(gate)}
    async with office.open():
        await office.publish(*(f"m{number}" for number in range(9)))
        assert len(office.transport.subscriptions[0].unsettled) == 4
        gate.set()
        await turns(60)
        assert len(office.transport.settled("ack")) == 9


# order


async def test_one_of_a_key_at_a_time_and_other_keys_beside() -> None:
    """With ordered a slow first message keeps its key waiting, and nothing else."""
    gate, office = anyio.Event(), Office(slots=2, ordered=True)
    office.script = {"a1": waits(gate)}
    async with office.open():
        await office.publish("a1", "a2", "b1", "a3", "b2")
        assert ["a1", "b1", "b2"] == office.ids
        gate.set()
        await turns()
    assert ["a1", "b1", "b2", "a2", "a3"] == office.ids


async def test_key_waits_for_a_failing_head_and_others_do_not() -> None:
    """A head that is tried again is settled before the next of its key starts; other keys go on meanwhile."""
    office = Office(Flaky(retry=60.0), ordered=True)
    order = list[str]()
    office.script = {"a1": verdict(Again(1.0), Again(1.0), Done())}
    async with office.open():
        await office.publish("a1", "a2", "b1")
        order = office.ids
    assert ["a1", "a1", "a1", "a2"] == [id for id in order if id[0] == "a"]
    assert "b1" in order


async def test_head_that_comes_back_while_it_is_sent_away() -> None:
    """A transport that delivers again before its retry() has returned leaves nothing stuck."""
    office = Office(Flaky(retry=60.0), ordered=True)
    gate = anyio.Event()

    async def back_at_once(delivery: Delivery, verdict: Verdict) -> bool:
        kept = await settle(delivery, verdict)
        if not isinstance(verdict, Done):
            await gate.wait()
        return kept

    office = Office(Flaky(retry=60.0), ordered=True, settle=back_at_once)
    office.script = {"a1": verdict(Again(1.0))}
    async with office.open():
        await office.publish("a1", "a2")
        assert ["a1", "a1", "a2"] == office.ids
        gate.set()
        await turns()
        await office.publish("a3")
    assert ["a1", "a1", "a2", "a3"] == office.ids


async def test_key_goes_on_when_its_head_cannot_be_sent_back() -> None:
    """A retry that comes too late to be settled frees its key: the message is somebody else's."""
    office = Office(Flaky(retry=60.0), ordered=True)
    office.script = {"a1": verdict(Again(1.0))}
    office.transport.trouble["settle"] = at(1, error=lambda: SettleError("late"))
    async with office.open():
        await office.publish("a1", "a2")
        assert ["a1", "a2"] == office.ids
        assert office.channel.lease_lost == 1


async def test_unordered_keys_do_not_wait() -> None:
    """Without ordered a key is only a name."""
    gate, office = anyio.Event(), Office(slots=2)
    office.script = {"a1": waits(gate)}
    async with office.open():
        await office.publish("a1", "a2", "a3")
        assert ["a1", "a2", "a3"] == office.ids
        gate.set()


# parking


async def test_retry_beyond_the_transport_is_kept_here() -> None:
    """Where the transport knows no delay, a message waits here, without a slot, and its attempts are counted here."""
    office = Office(slots=1)
    office.script = {"a1": verdict(Again(1.0), Postponed(2.0), Again(4.0))}
    async with office.open():
        await office.publish("a1", "b1")
        assert ["a1", "b1"] == office.ids
        assert office.channel.later() == 1
        await office.pass_time(100)
    expected = [("a1", 1, 0.0), ("b1", 1, 0.0), ("a1", 2, 1.0), ("a1", 2, 3.0), ("a1", 3, 7.0)]
    assert expected == office.started
    assert ["b1", "a1"] == office.transport.settled("ack")
    assert [] == office.transport.settled("retry")


async def test_parked_head_keeps_its_key_only() -> None:
    """The key of a parked message waits; what is parked later and due earlier is not late."""
    office = Office(ordered=True)
    office.script = {"a1": verdict(Again(10.0)), "b1": verdict(Again(1.0))}
    async with office.open():
        await office.publish("a1", "a2")
        await office.pass_time(5)
        await office.publish("b1", "b2", "c1")
        assert ["a1", "b1", "c1"] == office.ids
        assert office.channel.later() == 4
        await office.pass_time(20)
    assert [("b1", 2, 6.0), ("b2", 1, 6.0), ("a1", 2, 10.0), ("a2", 1, 10.0)] == office.started[3:]


# leases


async def test_leases_are_extended_while_anything_is_here() -> None:
    """Running, waiting and parked messages are extended three times a lease, and no longer once settled."""
    gate, transport = anyio.Event(), Flaky(returns="lease")
    office = Office(transport, slots=1, ordered=True)
    office.script = {"p1": verdict(Again(15.0)), "a1": waits(gate)}
    async with office.open():
        await office.publish("p1", "a1", "a2", "b1")
        await office.pass_time(29)
        counts = [transport.settled("extend").count(id) for id in ("p1", "a1", "a2", "b1")]
        assert [2, 2, 2, 2] == counts
        gate.set()
        await office.pass_time(100)
        assert len(transport.settled("extend")) == 8


async def test_what_runs_is_known_in_the_order_of_its_beginnings() -> None:
    """Leases are extended in an order that a seed can play again, and not by where in memory deliveries lie."""
    office = Office(slots=20)
    office.script = {f"m{number}": hangs() for number in range(20)}
    async with office.open():
        await office.publish(*office.script)
        assert office.ids == [delivery.wire.id for delivery in office.channel.running]


async def test_lease_that_cannot_be_extended_is_no_trouble_for_others(caplog: pytest.LogCaptureFixture) -> None:
    """One lost lease, or one bug, leaves the other leases and the worker alone."""
    transport = Flaky(returns="lease")
    office = Office(transport, slots=3)
    transport.trouble["extend"] = {1: SettleError("gone"), 2: ValueError("a bug")}.get
    office.script = dict.fromkeys(("a1", "b1", "c1"), hangs())
    async with office.open():
        await office.publish("a1", "b1", "c1")
        await office.pass_time(20)
        assert len(transport.settled("extend")) == 1 + 3
    assert caplog.text.count("is lost") == 2


# mending


@pytest.mark.parametrize("place", ["subscribe", "receive", "declare"])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("error", [Lost, Refused, ValueError], ids=lambda kind: kind.__name__)
async def test_source_is_mended(place: str, number: int, error: type[Exception]) -> None:
    """Wherever a source breaks, by loss or by bug, it is opened again with back-off, and everything is handled."""
    office = Office()
    office.transport.trouble[place] = at(number, number + 1, error=lambda: error("broken"))
    async with office.open():
        for count in range(1, 6):
            office.transport.trouble, trouble = {}, office.transport.trouble
            await office.transport.declare("t", ["g"])
            office.transport.calls["declare"] -= 1
            await office.transport.publish("t", [Wire(f"m{count}", b"{}")])
            office.transport.trouble = trouble
            await office.pass_time(1)
        await office.pass_time(30)
        assert office.channel.connected
    assert {f"m{count}" for count in range(1, 6)} == set(office.ids)
    assert {f"m{count}" for count in range(1, 6)} == set(office.transport.settled("ack"))
    assert [] == office.transport.settled("retry")


async def test_what_runs_when_the_link_breaks_goes_on_and_settles_too_late() -> None:
    """A running handler is not cut by a broken link; its settlement is lost and counted, the message comes again."""
    gate, office = anyio.Event(), Office()
    office.script = {"a1": waits(gate)}
    async with office.open():
        await office.publish("a1", "a2")
        office.transport.lose()
        await office.pass_time(1)
        assert office.ids.count("a1") == 2
        gate.set()
        await turns()
        assert office.channel.lease_lost == 1
        assert office.transport.settled("ack").count("a1") == 1


async def test_what_ends_after_the_link_broke_frees_no_key_of_the_next_life() -> None:
    """The end of a handling from before does not let the second of a key start beside its first."""
    first, second = anyio.Event(), anyio.Event()
    office, gates = Office(ordered=True), [first, second]

    async def next_gate(delivery: Delivery) -> Verdict:
        await gates.pop(0).wait()
        return Done()

    office.script = {"a1": next_gate}
    async with office.open():
        await office.publish("a1", "a2")
        office.transport.lose()
        await office.pass_time(1)
        assert ["a1", "a1"] == office.ids
        first.set()
        await turns()
        assert ["a1", "a1"] == office.ids
        second.set()
        await turns()
        assert ["a1", "a1", "a2"] == office.ids


async def test_parked_messages_of_a_lost_life_are_the_transports_again() -> None:
    """What was parked when the link broke comes again from the transport, once."""
    office = Office()
    office.script = {"a1": verdict(Again(5.0))}
    async with office.open():
        await office.publish("a1")
        office.transport.lose()
        await office.pass_time(20)
    assert ["a1", "a1"] == office.ids
    assert ["a1"] == office.transport.settled("ack")


async def test_source_that_breaks_all_the_time_is_not_tried_all_the_time() -> None:
    """A subscription that opens and breaks at once is tried a dozen times a minute, not a thousand."""
    office = Office()
    office.transport.trouble["receive"] = lambda _: Lost("at once")
    async with office.open():
        await office.pass_time(60)
        assert 8 <= office.transport.calls["subscribe"] <= 20
        assert office.transport.calls["open"] == 1
        office.transport.trouble = {}
        await office.publish("a1")
        await office.pass_time(10)
        assert ["a1"] == office.ids


async def test_settling_that_ends_in_a_bug_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    """An adapter that fails to settle costs that message its settlement, and nothing else."""
    office = Office(ordered=True)
    office.transport.trouble["settle"] = at(1, error=lambda: ValueError("a bug"))
    async with office.open():
        await office.publish("a1", "a2", "b1")
        assert {"a1", "a2", "b1"} == set(office.ids)
        assert office.channel.lease_lost == 1
    assert "settling message a1 failed" in caplog.text


async def test_attending_that_ends_in_a_bug_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    """A bug of our own costs no slot: the message comes again, uncounted, a second later."""
    office = Office(slots=1)
    failures = [ValueError("a bug")]

    async def stumbles(delivery: Delivery) -> Verdict:
        if failures:
            raise failures.pop()
        return Done()

    office.script = {"a1": stumbles}
    async with office.open():
        await office.publish("a1", "b1")
        assert ["a1", "b1"] == office.ids
        await office.pass_time(2)
    assert [("a1", 1, 0.0), ("b1", 1, 0.0), ("a1", 1, 1.0)] == office.started
    assert "attending to message a1 failed" in caplog.text


@asyncio_only
@pytest.mark.parametrize("swallowed", [False, True])
async def test_slot_that_a_stranger_cancels_is_replaced(swallowed: bool) -> None:
    """A handler that cancels its own task, asyncio's way, costs no slot, and its message comes again uncounted."""
    office, times = Office(slots=1), [1, 2]

    async def cancels_itself(delivery: Delivery) -> Verdict:
        if times and times.pop():
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            if swallowed:
                try:
                    await checkpoint()
                except asyncio.CancelledError:
                    return Cut()
            await checkpoint()
        return Done()

    office.script = {"a1": cancels_itself}
    async with office.open():
        await office.publish("a1", "b1")
        assert ["a1", "b1"] == office.ids
        await office.pass_time(10)
    assert [("a1", 1, 0.0), ("b1", 1, 0.0), ("a1", 1, 1.0), ("a1", 1, 2.0)] == office.started
    assert ["b1", "a1"] == office.transport.settled("ack")


@asyncio_only
@pytest.mark.parametrize("loop", ["intake", "parking", "leases"])
async def test_loop_that_a_stranger_cancels_is_replaced(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever cancels a loop of a source, asyncio's way, stops nothing: what was running comes again."""
    gate, office = anyio.Event(), Office(Flaky(returns="lease"), slots=1)
    office.script = {"a1": waits(gate)}
    async with office.open():
        await office.publish("a1")
        (task,) = [one for one in asyncio.all_tasks() if one.get_name() == f"eventbus {loop} of t@g"]
        task.cancel()
        await turns()
        gate.set()
        await office.pass_time(3)
        await office.publish("b1")
        assert (True, True) == (office.channel.alive, office.channel.connected)
        await office.pass_time(3)
    assert {"a1", "b1"} == {*office.transport.settled("ack")}
    assert "somebody cancelled" in caplog.text


# draining


async def test_drain_of_an_idle_worker_takes_no_time() -> None:
    """Where nothing runs nothing is waited for."""
    office = Office()
    async with office.open():
        assert await office.ended(within=0) == 0


async def test_drain_lets_the_running_finish_and_hands_back_the_rest() -> None:
    """Running handlers finish and are acked; what was not started goes back, uncounted and in the order of its key."""
    gate, office = anyio.Event(), Office(slots=2, ordered=True)
    office.script = {"a1": waits(gate), "b1": waits(gate)}
    async with office.open():
        await office.publish("a1", "a2", "b1", "a3", "c1")

        async def finishes() -> None:
            await turns()
            assert ["a2", "a3"] == [id for id in office.transport.settled("retry") if id[0] == "a"]
            await office.publish("d1")
            gate.set()

        async with anyio.create_task_group() as group:
            group.start_soon(finishes)
            assert await office.ended(within=0) == 0
        assert ["a1", "b1"] == sorted(office.transport.settled("ack"))
        assert {"a2", "a3", "c1"} == set(office.transport.settled("retry"))
        assert {0.0} == {entry[3] for entry in office.transport.log if entry[0] == "retry"}
        assert ["a1", "b1"] == sorted(office.ids)
        assert [] == office.transport.subscriptions


async def test_drain_starts_nothing_while_the_intake_stops() -> None:
    """From the first moment of a drain nothing more is started, though stopping the intake takes its time."""
    gate, stopping, office = anyio.Event(), anyio.Event(), Office(slots=1)
    office.script = {"m0": waits(gate)}
    office.transport.hooks["stop"] = stopping.wait
    async with office.open():
        await office.publish("m0", "m1", "m2")

        async def finishes() -> None:
            await turns()
            gate.set()
            await turns()
            assert ["m0"] == office.ids
            stopping.set()

        async with anyio.create_task_group() as group:
            group.start_soon(finishes)
            await office.ended(within=0)
    assert ["m0"] == office.ids
    assert ["m1", "m2"] == sorted(office.transport.settled("retry"))


async def test_drain_hands_back_what_arrives_after_the_stop() -> None:
    """What an adapter had fetched already, and gives out after its stop, goes back too."""
    office = Office(slots=1)
    office.transport.late = [Wire("l1", b"{}"), Wire("l2", b"{}")]
    async with office.open():
        await office.publish("m0")
        office.transport.hooks["receive"] = turns
        await office.ended(within=0)
    assert ["m0"] == office.ids
    assert ["l1", "l2"] == sorted(office.transport.settled("retry"))


async def test_drain_cuts_what_does_not_end() -> None:
    """At the deadline less the reserve the rest is cancelled and handed back, and the drain ends in time."""
    cut, office = list[str](), Office(slots=2, drain=20.0)
    office.script = {"a1": hangs(cut), "b1": hangs(cut)}
    async with office.open():
        await office.publish("a1", "b1", "c1")
        assert await office.ended(within=20) == 18
        assert ["a1", "b1"] == sorted(cut)
        assert ["a1", "b1", "c1"] == sorted(office.transport.settled("retry"))
        assert [] == office.transport.settled("ack")
        assert (0, 0) == (office.channel.handled, office.channel.lease_lost)


async def test_short_drain_reserves_a_quarter() -> None:
    """With a drain of a second the last quarter of it is for handing back."""
    office = Office(drain=1.0)
    office.script = {"a1": hangs()}
    async with office.open():
        await office.publish("a1")
        assert await office.ended(within=1) == pytest.approx(0.75)


async def test_handler_that_does_not_let_itself_be_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that swallows its cancellation holds up neither the drain's deadline nor the others' way back."""
    gate, office = anyio.Event(), Office(slots=2, drain=20.0)

    async def stubborn(delivery: Delivery) -> Verdict:
        with anyio.CancelScope(shield=True):
            await gate.wait()
        return Done()

    office.script = {"a1": stubborn, "b1": hangs()}
    async with office.open():
        await office.publish("a1", "b1", "c1")
        assert 18 < await office.ended(within=20) <= 20
        assert ["b1", "c1"] == sorted(office.transport.settled("retry"))
        assert "t@g: 1 handling(s) could not be ended" in caplog.text
        gate.set()


async def test_drain_hands_back_what_is_parked() -> None:
    """A parked message does not hold up a drain: it goes back, and its key's others behind it."""
    office = Office(ordered=True)
    office.script = {"a1": verdict(Again(5.0))}
    async with office.open():
        await office.publish("a1", "a2", "a3")
        assert await office.ended(within=0) == 0
        assert ["a1", "a2", "a3"] == office.transport.settled("retry")


async def test_drain_while_the_link_is_down() -> None:
    """A source that waits for its link, or for its next attempt, ends at once."""
    for place in ("open", "subscribe"):
        office = Office()
        office.transport.trouble[place] = lambda _: Lost("away")
        async with office.open():
            assert await office.ended(within=0) == 0


async def test_drain_that_finds_the_link_broken(caplog: pytest.LogCaptureFixture) -> None:
    """A link that breaks while draining is not opened again, and what cannot be handed back is counted as lost."""
    gate, office = anyio.Event(), Office(slots=1)
    office.script = {"a1": waits(gate)}
    office.transport.trouble["stop"] = at(1)
    async with office.open():
        await office.publish("a1", "b1")

        async def breaks() -> None:
            await turns()
            office.transport.lose()
            gate.set()

        async with anyio.create_task_group() as group:
            group.start_soon(breaks)
            await office.ended(within=20)
        assert office.transport.calls["subscribe"] == 1
        assert "lost while stopping" in caplog.text
        assert ["a1"] == office.ids
        assert office.channel.lease_lost == 2


async def test_link_that_breaks_while_draining_is_not_mended() -> None:
    """What is lost while it stops stays lost: nothing is taken in again, and nothing is waited for."""
    for hanging in (False, True):
        office = Office(slots=1)
        if hanging:
            office.script = {"a1": hangs()}

        async def breaks(office: Office = office) -> None:
            office.transport.lose()

        office.transport.hooks["stop"] = breaks
        async with office.open():
            await office.publish("a1", "b1")
            assert await office.ended(within=20) == (18 if hanging else 0)
        assert office.transport.calls["subscribe"] == 1


async def test_intake_that_does_not_stop_is_left_at_the_deadline() -> None:
    """An adapter that hangs in stop() costs the deadline, not more, and what it gave out goes back."""
    office = Office(slots=1, drain=20.0)
    office.script = {"a1": hangs()}
    office.transport.hooks["stop"] = anyio.sleep_forever
    async with office.open():
        await office.publish("a1", "b1")
        assert await office.ended(within=20) == pytest.approx(19)


async def test_drain_before_anything_has_run() -> None:
    """A worker that is drained in the moment of its start ends like any other."""
    office = Office()
    async with anyio.create_task_group() as group:
        await group.start(office.link.keep)
        group.start_soon(office.worker.run)
        assert await office.ended(within=0) == 0
        group.cancel_scope.cancel()


async def test_second_drain_is_harmless() -> None:
    """Draining again, during and after, changes nothing."""
    gate, office = anyio.Event(), Office()
    office.script = {"a1": waits(gate)}
    async with office.open():
        await office.publish("a1", "b1")
        async with anyio.create_task_group() as group:
            group.start_soon(office.worker.drain)
            group.start_soon(office.worker.drain)
            await turns()
            gate.set()
        await office.worker.drain()
    assert ["a1", "b1"] == sorted(office.transport.settled("ack"))


async def test_several_sources_drain_in_parallel() -> None:
    """Ten sources that all need the whole time need it together, not one after another."""
    office = Office(drain=20.0)
    runtime = Runtime(office.clock, random=Random(0))
    sources = [
        Source(
            name=f"t{number}",
            subscribe=partial(office.link.subscribe, f"t{number}", group="g", prefetch=1, lease=30.0, ordered=False),
            attend=hangs(),
            settle=settle,
            slots=1,
        )
        for number in range(10)
    ]
    office.worker = Worker(sources, runtime, Limits(drain=20.0))
    async with office.open():
        for number in range(10):
            await office.transport.publish(f"t{number}", [Wire(f"m{number}", b"{}")])
        await turns()
        assert sum(len(channel.running) for channel in office.worker.channels) == 10
        assert await office.ended(within=20) == 18
    assert len(office.transport.settled("retry")) == 10


async def test_drain_works_off_what_would_be_lost() -> None:
    """A source whose messages end with the process goes on until none is left, or time is up."""
    transport = Flaky()
    office = Office(transport, slots=1, remaining=transport.outstanding)
    gate = anyio.Event()
    office.script = {"m0": waits(gate)}
    async with office.open():
        await office.publish(*(f"m{number}" for number in range(20)))

        async def finishes() -> None:
            await turns()
            gate.set()

        async with anyio.create_task_group() as group:
            group.start_soon(finishes)
            assert await office.ended(within=0) == 0
    assert len(transport.settled("ack")) == 20
    assert [] == transport.settled("retry")


async def test_drain_does_not_wait_for_what_is_due_later() -> None:
    """A parked message, and those of its key behind it, are not worked off: nothing of them could start now."""
    transport = Flaky()
    office = Office(transport, slots=1, ordered=True, remaining=transport.outstanding)
    office.script = {"a1": verdict(Again(60.0))}
    async with office.open():
        await office.publish("a1", "a2", "b1")
        assert await office.ended(within=0) == 0
    assert ["b1"] == transport.settled("ack")
    assert ["a1", "a2"] == transport.settled("retry")


async def test_cut_ends_everything_now() -> None:
    """After a cut a drain needs no time at all."""
    notes, office = list[str](), Office()
    office.script = {"a1": hangs(notes)}
    async with office.open():
        await office.publish("a1", "b1")
        office.worker.cut()
        await turns()
        assert ["a1"] == notes
        assert await office.ended(within=0) == 0
        assert ["a1"] == office.transport.settled("retry")


async def test_names_of_tasks_say_what_they_do() -> None:
    """Every task of the worker is named after its source."""
    async with Office(Flaky(returns="lease"), slots=2).open():
        names = [task.name for task in anyio.get_running_tasks() if task.name and task.name.startswith("eventbus")]
    counts = defaultdict[str, int](int)
    for name in names:
        counts[name] += 1
    expected = {"eventbus t@g": 1, "eventbus slot of t@g": 2, "eventbus intake of t@g": 1}
    assert expected.items() <= counts.items()
    assert {"eventbus parking of t@g", "eventbus leases of t@g"} <= counts.keys()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "eventbus")
