"""Run one source: subscribe, keep slots busy and lanes in order, drain. Decisions are delivery's.

A source is one subscription of one handler. Its intake receives what the transport gives (never more than prefetch
unsettled), its slots attend to it. A delivery that comes again goes back to its transport, while others of its key
wait here; if the transport cannot hold it so long, it is parked here, without a slot. A lost subscription is opened
again with back-off, while what is running goes on and finds at its settling that it came too late.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from eventbus._signal import Signal
from eventbus.clock import Runtime
from eventbus.delivery import Cut, Postponed, Verdict
from eventbus.errors import EventBusError
from eventbus.lanes import Held, Lanes
from eventbus.link import Backoff, Progress
from eventbus.retry import Again
from eventbus.transport import Delivery, Subscription

__all__ = ("Channel", "Source")

log = logging.getLogger("eventbus")

FAIR = 16
"""Handlings of one slot between two sure visits to the event loop."""

STRAY = 1.0
"""Seconds after which a message comes again whose handling somebody else cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Say where deliveries come from, who attends to them and how they are settled."""

    name: str
    subscribe: Callable[[], AbstractAsyncContextManager[Subscription]]
    attend: Callable[[Delivery], Awaitable[Verdict]]
    settle: Callable[[Delivery, Verdict], Awaitable[bool]]
    slots: int
    """Deliveries at once that are being handled, or handled and not settled yet."""
    post: Callable[[Delivery, Verdict, Callable[[bool], None]], None] | None = None
    """How to settle without waiting, so that one statement settles many; None: with its slot waiting."""
    ordered: bool = False
    longest: float = float("inf")
    """The longest delay in seconds that the transport can hold; beyond it the delivery is parked here."""
    remaining: Callable[[], int] | None = None
    """What nobody else will run after a drain, so that the drain works it off; None: it is handed back."""
    busy: Callable[[], int] | None = None
    """What a source of its own kind still has to do now; transports are counted as a whole."""
    progress: Callable[[], Progress] | None = None
    """How it gets on, if it asks; a transport gives by itself."""
    lasting: bool = False
    """Whether what was received is still ours when the subscription is lost, as entries in a store are."""
    lease: float | None = None
    """Seconds after which an unsettled delivery is taken away unless extended; None: never."""


class Channel:
    """Run one source."""

    def __init__(self, source: Source, runtime: Runtime, changed: Signal) -> None:
        self.source = source
        self.tried = anyio.Event()
        """Set when the first attempt to subscribe has ended, one way or the other."""
        self.running: dict[Delivery, None] = {}
        self.handled = 0
        self.received: float | None = None
        """When it last received something."""
        self.lease_lost = 0
        self.backoff = Backoff(runtime)
        self.slots = anyio.CancelScope()
        self._clock = runtime.clock
        self._changed = changed
        self._lanes = Lanes(source.ordered)
        self._idle: deque[anyio.Event] = deque()
        self._called = False
        """Whether an idle slot was woken and has not looked yet."""
        self._parked = Signal()
        self._cut: list[Delivery] = []
        self._subscription: Subscription | None = None
        self._intake = anyio.CancelScope()
        self._resting = False
        self._received = anyio.Event()
        self._slots_ended = anyio.Event()
        self._drained = anyio.Event()

    @property
    def connected(self) -> bool:
        """Tell whether the subscription is open."""
        return self._subscription is not None

    @property
    def alive(self) -> bool:
        """Tell whether its loops go on."""
        return not (self._received.is_set() or self._slots_ended.is_set())

    def later(self) -> int:
        """Count what is parked here until later."""
        return self._lanes.later(self._clock.monotonic())

    async def run(self) -> None:
        """Run until drained."""
        name = self.source.name
        async with anyio.create_task_group() as group:
            group.start_soon(self._supervise, group, name=f"eventbus intake of {name}")
            try:
                with self.slots:
                    while True:
                        await self._run_slots(name)
                        log.warning("%s: somebody cancelled a task of it, all its slots begin again", name)
            finally:
                self._slots_ended.set()
                self._changed.fire()

    async def _run_slots(self, name: str) -> None:
        async with anyio.create_task_group() as slots:
            slots.start_soon(self._ripen, name=f"eventbus parking of {name}")
            if self.source.lease is not None:
                slots.start_soon(self._extend, self.source.lease / 3, name=f"eventbus leases of {name}")
            for _ in range(self.source.slots):
                slots.start_soon(self._slot, slots, name=f"eventbus slot of {name}")
            while self._cut:
                slots.start_soon(self._conclude, self._lanes, self._cut.pop(), Postponed(STRAY))

    async def drain(self, grace: float, reserve: float, left: Callable[[], bool]) -> None:
        """End this source within ``grace`` plus ``reserve`` seconds; what is only here is worked off while it can."""
        with self._clock.move_on_after(grace):
            if self.source.remaining is None:
                self._resting = True
                await self._stop_intake()
                await self._hand_back(self._lanes.clear())
            while self._busy(left):
                await self._changed.wait()
        self._resting = True
        self.slots.cancel()
        with self._clock.move_on_after(reserve / 2):
            await self._slots_ended.wait()
        with self._clock.move_on_after(reserve / 2) as handing:
            await self._stop_intake()
            await self._hand_back([*self._cut, *self._lanes.clear()])
            while self.running and self._slots_ended.is_set():
                await self._changed.wait()
        if handing.cancelled_caught:
            log.warning("%s: no time was left to hand everything back, the rest waits for its lease", self.source.name)
        if self.running:
            log.warning("%s: %d handling(s) could not be ended", self.source.name, len(self.running))
        self._drained.set()

    def _busy(self, left: Callable[[], bool]) -> bool:
        """Tell whether a drain has something to wait for."""
        if self.slots.cancel_called or self._slots_ended.is_set():
            return False
        return bool(self.running) or (self.source.remaining is not None and left())

    async def _stop_intake(self) -> None:
        """Take nothing more in; return when all that was on its way is here."""
        if self._subscription is None:
            self._intake.cancel()
        elif not self._received.is_set():
            try:
                await self._subscription.stop()
            except Exception as error:
                log.warning("%s: lost while stopping: %s", self.source.name, error)
                self._intake.cancel()
        await self._received.wait()

    async def _hand_back(self, deliveries: Sequence[Delivery]) -> None:
        """Give deliveries back, those of one key in their order."""
        lanes: dict[object, list[Delivery]] = {}
        for delivery in deliveries:
            key = delivery.wire.key if self.source.ordered else None
            lanes.setdefault(delivery if key is None else key, []).append(delivery)
        async with anyio.create_task_group() as group:
            for lane in lanes.values():
                group.start_soon(self._hand_back_lane, lane)

    async def _hand_back_lane(self, lane: Sequence[Delivery]) -> None:
        for delivery in lane:
            self.lease_lost += not await self._settle(delivery, Postponed(0.0))

    async def _supervise(self, group: TaskGroup) -> None:
        ended = True
        try:
            with self._intake:
                while not self._resting:
                    await self._take_in()
                    self._lost()
                    if not self._resting:
                        await self._clock.sleep(self.backoff.pause())
        except anyio.get_cancelled_exc_class():
            if self._resting or self._ends():
                raise
            log.warning("%s: somebody cancelled the intake, another takes its place", self.source.name)
            ended, self._intake = False, anyio.CancelScope()
            self._lost()
            group.start_soon(self._supervise, group, name=f"eventbus intake of {self.source.name}")
        finally:
            if ended:
                self._received.set()

    def _lost(self) -> None:
        """Let go of a subscription, and of what only it could settle."""
        if not self.source.lasting:
            self._lanes = Lanes(self.source.ordered)
        self.backoff.failed()
        self.tried.set()

    async def _take_in(self) -> None:
        """Receive until the subscription is lost, or stopped and drained."""
        try:
            async with self.source.subscribe() as subscription:
                self._subscription = subscription
                self.backoff.opened()
                self.tried.set()
                await self._receive(subscription)
                self._received.set()
                await self._drained.wait()
        except EventBusError as error:
            log.warning("%s: %s", self.source.name, error)
        except Exception:
            log.exception("%s failed", self.source.name)
        finally:
            self._subscription = None

    async def _receive(self, subscription: Subscription) -> None:
        while True:
            try:
                delivery = await subscription.receive()
            except anyio.EndOfStream:
                return
            self.received = self._clock.monotonic()
            if self._lanes.admit(delivery):
                self._wake()

    def _wake(self) -> None:
        """Have an idle slot look for something to do; when it has found it, it wakes the next."""
        if self._idle and not self._called and len(self.running) < self.source.slots:
            self._called = True
            self._idle.popleft().set()

    async def _slot(self, slots: TaskGroup) -> None:
        try:
            await self._work(slots)
        except anyio.get_cancelled_exc_class():
            if self._ends():
                raise
            log.warning("%s: somebody cancelled a slot, another takes its place", self.source.name)
            slots.start_soon(self._slot, slots, name=f"eventbus slot of {self.source.name}")

    def _ends(self) -> bool:
        """Tell whether a cancellation of this moment is the end of the source."""
        return self.slots.cancel_called or anyio.current_effective_deadline() == float("-inf")

    async def _work(self, slots: TaskGroup) -> None:
        turn = 0
        while True:
            full = self._resting or len(self.running) >= self.source.slots
            delivery = None if full else self._lanes.take()
            if delivery is None:
                await self._news()
                continue
            self.running[delivery] = None  # in the order of their beginnings, in which leases are extended
            if self._lanes.ready:
                self._wake()
            await self._handle(delivery, slots)
            turn += 1
            if turn % FAIR == 0:
                await checkpoint()

    async def _news(self) -> None:
        """Wait to be woken; a slot that is cancelled meanwhile takes no wake-up with it."""
        event = anyio.Event()
        self._idle.append(event)
        try:
            await event.wait()
            self._called = False
        except BaseException:
            if event.is_set():
                self._called = False
                self._wake()
            else:
                self._idle.remove(event)
            raise

    async def _handle(self, delivery: Delivery, slots: TaskGroup) -> None:
        lanes, over = self._lanes, False
        try:
            verdict = await self.source.attend(delivery)
            over = not isinstance(verdict, Cut)
            if over:
                await self._conclude(lanes, delivery, verdict)
        except Exception:
            over = False
            log.exception("%s: attending to message %s failed", self.source.name, delivery.wire.id)
        except BaseException:
            over = False
            raise
        finally:
            if not over:
                self._cut_off(lanes, delivery, slots)
                self._leave(delivery)

    def _cut_off(self, lanes: Lanes, delivery: Delivery, slots: TaskGroup) -> None:
        """Keep what was cancelled for handing it back; what a stranger cancelled comes again."""
        if self._ends():
            self._cut.append(delivery)
        else:
            slots.start_soon(self._conclude, lanes, delivery, Postponed(STRAY))

    async def _conclude(self, lanes: Lanes, delivery: Delivery, verdict: Verdict) -> None:
        """Settle a delivery, or park it here, and let the next of its key come if it is over."""
        again = verdict if isinstance(verdict, Again | Postponed) else None
        if again is not None and again.after > self.source.longest:
            attempt = max(delivery.attempt, 1) + isinstance(again, Again)
            lanes.park(Held(delivery, attempt), self._clock.monotonic() + again.after)
            self._parked.fire()
            self._leave(delivery)
            return
        if again is not None:
            lanes.send_away(delivery)
        told = partial(self._concluded, lanes, delivery, again is None)
        if self.source.post is not None:
            self.source.post(delivery, verdict, told)
        else:
            told(await self._settle(delivery, verdict))

    def _concluded(self, lanes: Lanes, delivery: Delivery, over: bool, kept: bool) -> None:
        self.handled += 1
        self.lease_lost += not kept
        if over:
            lanes.leave(delivery)
        elif not kept:
            lanes.give_up(delivery)
        self._leave(delivery)

    def _leave(self, delivery: Delivery) -> None:
        """Free the slot of a delivery."""
        self.running.pop(delivery, None)
        if self._lanes.ready:
            self._wake()
        self._changed.fire()

    async def _settle(self, delivery: Delivery, verdict: Verdict) -> bool:
        try:
            return await self.source.settle(delivery, verdict)
        except Exception:
            log.exception("%s: settling message %s failed", self.source.name, delivery.wire.id)
            return False

    async def _ripen(self) -> None:
        while True:
            due = self._lanes.next_due()
            if due is None:
                await self._parked.wait()
                continue
            with self._clock.move_on_after(due - self._clock.monotonic()):
                await self._parked.wait()
            if self._lanes.ripen(self._clock.monotonic()):
                self._wake()

    async def _extend(self, every: float) -> None:
        while True:
            await self._clock.sleep(every)
            async with anyio.create_task_group() as group:
                for delivery in [*self.running, *self._lanes]:
                    group.start_soon(self._extend_one, delivery)

    async def _extend_one(self, delivery: Delivery) -> None:
        try:
            await delivery.extend()
        except Exception as error:
            log.warning("%s: the lease of message %s is lost: %s", self.source.name, delivery.wire.id, error)
