"""The lifetime of a bus: start, stop, drain, restart; loops, threads and processes it is not of; a link that breaks."""

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Self

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint

from eventbus import (
    AlreadyRunningError,
    Command,
    Context,
    Event,
    EventBus,
    Limits,
    Lost,
    Module,
    NotRunningError,
    Retry,
    StoreError,
    WiringError,
    WrongLoopError,
)
from eventbus.clock import Runtime
from eventbus.stores.memory import MemoryStore
from eventbus.testing.clock import VirtualClock
from tests.doubles import Flaky, at, raised

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class Paid(Event, name="t.paid", key="account"):
    """State that something was paid."""

    number: int = 0
    account: str = "a"


class Sent(Event, name="t.sent"):
    """State that something was sent."""


class Double(Command[int], name="t.double"):
    """Ask for twice a number."""

    number: int


class Shop:
    """Hold a bus with one handler, which does as it is told."""

    def __init__(self, *, routes: Any = None, handler: dict[str, Any] | None = None, **options: Any) -> None:
        self.seen: list[tuple[int, int]] = []
        self.done: list[int] = []
        self.action: Callable[[Paid], Any] | None = None
        module = Module("m")

        @module.on(Paid, **(handler or {}))
        async def paid(event: Paid, ctx: Context) -> None:
            self.seen.append((event.number, ctx.attempt))
            if self.action is not None:
                await self.action(event)
            self.done.append(event.number)

        @module.handles(Double)
        async def double(cmd: Double) -> int:
            return cmd.number * 2

        self.bus = EventBus(module, name="shop", routes=routes or {Paid: "memory"}, **options)


async def until(fact: Callable[[], object]) -> None:
    """Let others go on until something is so."""
    with anyio.fail_after(20):
        while not fact():  # noqa: ASYNC110
            await anyio.sleep(0.001)


# running


async def test_bus_handles_while_it_runs() -> None:
    """Between start and stop what is routed is handled; the state and the health say where it is."""
    shop = Shop()
    assert ("not started", False) == (shop.bus.engine.state, shop.bus.health().healthy)
    async with shop.bus.running() as bus:
        assert bus is shop.bus
        assert ("running", True) == (bus.health().state, bus.health().healthy)
        await bus.publish(Paid(number=1))
        await until(lambda: shop.done)
    assert ("stopped", False) == (shop.bus.engine.state, shop.bus.health().healthy)
    assert [(1, 1)] == shop.seen


async def test_backlog_in_memory_is_worked_off_before_the_end() -> None:
    """What waits in memory would be lost with the process, so stopping works it off."""
    shop = Shop(handler={"concurrency": 2})
    async with shop.bus.running() as bus:
        for number in range(200):
            await bus.publish(Paid(number=number))
    assert list(range(200)) == sorted(shop.done)


async def test_what_handlers_publish_while_stopping_is_worked_off_too() -> None:
    """A chain of events through memory is finished before the bus stops."""
    module, seen = Module("m"), list[int]()

    @module.on(Paid)
    async def paid(event: Paid, bus: EventBus) -> None:
        seen.append(event.number)
        if event.number < 20:
            await bus.publish(Paid(number=event.number + 1))

    async with EventBus(module, routes={Paid: "memory"}).running() as bus:
        await bus.publish(Paid(number=0))
    assert list(range(21)) == seen


async def test_publish_only() -> None:
    """With consume=False nothing is handled here; it waits for a lifetime that consumes."""
    shop = Shop()
    async with shop.bus.running(consume=False) as bus:
        await bus.publish(Paid(number=1))
        for _ in range(20):
            await checkpoint()
        assert [] == shop.seen
        assert bus.health().healthy
    async with shop.bus.running():
        pass
    assert [(1, 1)] == shop.seen


class OwnError(Exception):
    """Be an error of the body."""


@pytest.mark.parametrize("kind", [OwnError, KeyboardInterrupt, SystemExit])
async def test_error_of_the_body_is_raised_as_it_is(kind: type[BaseException]) -> None:
    """What the block raises comes out alone, in no group, and the bus has stopped."""
    shop, wrong = Shop(), kind()
    with raised(kind) as caught:
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=1))
            raise wrong
    assert [wrong] == caught
    assert shop.bus.engine.state == "stopped"
    assert [1] == shop.done


async def test_group_of_the_body_stays_as_it_is() -> None:
    """An exception group that the block raises is neither wrapped nor unwrapped."""
    group = ExceptionGroup("mine", [OwnError(), OwnError()])
    with raised(ExceptionGroup) as caught:
        async with Shop().bus.running():
            raise group
    assert [group] == caught


async def test_cancelled_body_drains_and_goes_on_being_cancelled() -> None:
    """A cancelled block lets running handlers finish, and the cancellation goes on."""
    shop, started = Shop(), anyio.Event()

    async def slow(event: Paid) -> None:
        started.set()
        await anyio.sleep(0.02)

    shop.action = slow
    with anyio.CancelScope() as scope:
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=1))
            await started.wait()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert [1] == shop.done


async def test_faulty_wiring_opens_nothing() -> None:
    """A fault in the wiring is told before any transport or store is opened."""
    transport = Flaky()
    bus = EventBus(Module("m", messages=[Paid]), name="shop", transports={"events": transport}, routes={Paid: "event"})
    with raised(WiringError):
        async with bus.running():
            pass
    assert transport.calls["open"] == 0


async def test_transport_of_another_event_loop_is_a_fault(anyio_backend_name: str) -> None:
    """A transport that does not run on this kind of event loop is named before it is opened."""
    other = "trio" if anyio_backend_name == "asyncio" else "asyncio"
    transport = Flaky(backends=frozenset({other}))
    shop = Shop(routes={Paid: "events"}, transports={"events": transport})
    with pytest.raises(
        WiringError, match=f"transport 'events' runs on {other}, and this event loop is {anyio_backend_name}'s"
    ):
        async with shop.bus.running():
            pass
    assert transport.calls["open"] == 0


async def test_transport_that_cannot_start_says_so() -> None:
    """What ends the start comes out as it is, nothing stays open, and the bus can be started later."""
    transport = Flaky()
    transport.trouble["open"] = at(1, error=lambda: ValueError("bad option"))
    shop = Shop(routes={Paid: "events"}, transports={"events": transport})
    with raised(ValueError):
        async with shop.bus.running():
            pass
    assert ("stopped", 0) == (shop.bus.engine.state, transport.open)
    async with shop.bus.running() as bus:
        await bus.publish(Paid(number=1))
        await until(lambda: shop.done)


class Broken(MemoryStore):
    """Be a store that fails where it is told to."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    async def __aenter__(self) -> Self:
        await checkpoint()
        if self.place == "open":
            raise StoreError("no disk")
        await super().__aenter__()
        return self

    async def announce(self, *args: Any, **options: Any) -> None:
        """Fail if told to."""
        if self.place == "announce":
            raise StoreError("no disk")
        await super().announce(*args, **options)


@pytest.mark.parametrize("place", ["open", "announce"])
async def test_store_that_cannot_start_says_so(place: str) -> None:
    """A store that fails at the start ends it, in no group, and the bus can be started later."""
    store = Broken(place)
    shop = Shop(routes={Paid: "store"}, store=store)
    with raised(StoreError):
        async with shop.bus.running():
            pass
    store.place = ""
    async with shop.bus.running() as bus:
        await bus.publish(Paid(number=1), atomic=False)
        await until(lambda: shop.done)


# running twice


async def test_bus_runs_once_at_a_time() -> None:
    """A second lifetime inside the first is refused, and the first is not disturbed."""
    shop = Shop()
    async with shop.bus.running() as bus:
        with raised(AlreadyRunningError):
            async with bus.running():
                pass
        await bus.publish(Paid(number=1))
        await until(lambda: shop.done)


async def test_two_starts_at_once() -> None:
    """Of two tasks that start the bus in the same moment one is refused."""
    shop = Shop(routes={Paid: "store"}, store=Broken("nowhere"))
    outcome = list[str]()

    async def start() -> None:
        try:
            async with shop.bus.running():
                outcome.append("ran")
                await anyio.sleep(0.01)
        except AlreadyRunningError:
            outcome.append("refused")

    async with anyio.create_task_group() as group:
        group.start_soon(start)
        group.start_soon(start)
    assert ["ran", "refused"] == sorted(outcome)


async def test_start_after_stop_works() -> None:
    """A bus that was stopped can be started again and again, and consumes each time."""
    shop = Shop()
    for number in range(5):
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=number))
            await until(lambda: len(shop.done) == number + 1)  # noqa: B023
            assert bus.health().healthy


async def test_rounds_of_start_and_stop_leave_nothing_behind() -> None:
    """Ten rounds of ten buses leave no task, no thread and no bus behind."""

    async def one(number: int) -> None:
        shop = Shop(routes={Paid: "memory", Sent: "store"}, store=MemoryStore())
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=number))
        assert [number] == shop.done

    async with anyio.create_task_group() as group:
        group.start_soon(one, -1)
    tasks, threads = len(anyio.get_running_tasks()), threading.active_count()
    for _ in range(10):
        async with anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(one, number)
    await checkpoint()
    gc.collect()
    assert tasks == len(anyio.get_running_tasks())
    assert threading.active_count() <= threads


def test_one_bus_in_several_event_loops_one_after_another() -> None:
    """A bus at module level serves one event loop after another, of either kind."""
    shop = Shop()

    async def main(number: int) -> None:
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=number))
            assert await bus.send(Double(number=number)) == number * 2

    for number, backend in enumerate(("asyncio", "trio", "asyncio", "trio")):
        anyio.run(main, number, backend=backend)
    assert [0, 1, 2, 3] == shop.done


# drain


async def test_drain_gives_up_at_its_deadline_and_nothing_is_lost() -> None:
    """A handler that outlasts the drain is cancelled; its message waits, uncounted, for the next lifetime."""
    shop, started = Shop(limits=Limits(drain=0.2)), anyio.Event()

    async def hangs(event: Paid) -> None:
        started.set()
        await anyio.sleep_forever()

    shop.action = hangs
    with anyio.fail_after(10):
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=1))
            await started.wait()
    assert [] == shop.done
    shop.action = None
    async with shop.bus.running():
        pass
    assert [(1, 1), (1, 1)] == shop.seen
    assert [1] == shop.done


async def test_cancelling_again_while_draining_is_harmless() -> None:
    """Somebody who loses patience with a drain cannot cut it short by a scope, nor harm the bus."""
    shop, started, stopping = Shop(), anyio.Event(), anyio.Event()

    async def slow(event: Paid) -> None:
        started.set()
        await stopping.wait()
        await anyio.sleep(0.02)

    shop.action = slow

    async def life() -> None:
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=1))
            await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(life)
        await started.wait()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await until(lambda: shop.bus.engine.state == "stopping")
            stopping.set()
            group.cancel_scope.cancel()
    assert [1] == shop.done
    shop.action = None
    async with shop.bus.running():
        pass


@asyncio_only
async def test_native_cancellation_of_a_drain_ends_it_and_the_bus_can_start_again() -> None:
    """Asyncio's own second cancellation pierces every shield: no failure is counted, and a new start works."""
    shop, started = Shop(), anyio.Event()

    async def hangs(event: Paid) -> None:
        started.set()
        await anyio.sleep_forever()

    shop.action = hangs

    async def life() -> None:
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=1))
            await anyio.sleep_forever()

    task = asyncio.create_task(life())
    await started.wait()
    task.cancel()
    await until(lambda: shop.bus.engine.state == "stopping")
    task.cancel()
    assert [asyncio.CancelledError] == [type(one) for one in await asyncio.gather(task, return_exceptions=True)]
    assert shop.bus.engine.state == "stopped"
    shop.action = None
    async with shop.bus.running() as bus:
        assert [] == await bus.dead.find()
    assert [1] == shop.done


@asyncio_only
async def test_native_cancellation_of_everything_counts_no_failure() -> None:
    """When all tasks of the process are cancelled at once, nothing is acked and nothing is counted as failed."""
    transport = Flaky(retry=60.0)
    shop = Shop(routes={Paid: "events"}, transports={"events": transport})
    started, before = anyio.Event(), asyncio.all_tasks()

    async def hangs(event: Paid) -> None:
        started.set()
        await anyio.sleep_forever()

    shop.action = hangs

    async def life() -> None:
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=1))
            await anyio.sleep_forever()

    tasks = [asyncio.create_task(life())]
    await started.wait()
    tasks = [task for task in asyncio.all_tasks() if task not in before]
    for task in tasks:
        task.cancel()
    with anyio.fail_after(10):
        await asyncio.wait(tasks)
    assert [] == transport.settled("ack")
    assert {0.0, 1.0} >= {entry[3] for entry in transport.log if entry[0] == "retry"}
    assert [] == transport.settled("reject")
    assert (0, "stopped") == (transport.open, shop.bus.engine.state)


async def test_handler_that_swallows_its_cancellation_does_not_hold_up_the_end() -> None:
    """A handler that goes on for a while after its cancellation is waited for; then the bus has stopped."""
    shop, started = Shop(limits=Limits(drain=0.1)), anyio.Event()

    async def stubborn(event: Paid) -> None:
        started.set()
        for _ in range(3):
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                pass

    shop.action = stubborn
    with anyio.fail_after(10):
        async with shop.bus.running() as bus:
            await bus.publish(Paid(number=1))
            await started.wait()
    assert shop.bus.engine.state == "stopped"
    assert [1] == shop.done


# where it does not run


async def test_before_and_after() -> None:
    """What needs a running bus says so before the start and after the stop; what does not, works."""
    shop = Shop(store=MemoryStore())
    for state in ("not started", "stopped"):
        for call in (
            lambda: shop.bus.publish(Paid()),
            lambda: shop.bus.publish_many([Sent(), Paid()]),
            shop.bus.dead.find,
            lambda: shop.bus.transaction().__aenter__(),
            lambda: shop.bus.stream(Paid).__aenter__(),
        ):
            with pytest.raises(NotRunningError, match=f"this one is {state}"):
                await call()
        assert await shop.bus.send(Double(number=2)) == 4
        await shop.bus.publish(Sent())
        async with shop.bus.running():
            pass


async def test_in_a_thread_without_an_event_loop() -> None:
    """In a thread that has no event loop a routed publish says where the bus runs; from_thread is the way."""
    shop, errors = Shop(), list[Exception]()

    def in_thread() -> None:
        try:
            shop.bus.publish(Paid()).send(None)
        except WrongLoopError as error:
            errors.append(error)
        anyio.from_thread.run(shop.bus.publish, Paid(number=1))

    async with shop.bus.running():
        await anyio.to_thread.run_sync(in_thread)
        await until(lambda: shop.done)
    (error,) = errors
    assert "a thread without an event loop" in str(error)
    assert [(1, 1)] == shop.seen


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
async def test_in_another_event_loop(backend: str) -> None:
    """From another event loop routed publishes, streams, the dead and a second start are refused; inline works."""
    shop, errors = Shop(), list[str]()

    async def elsewhere() -> int:
        for call in (
            lambda: shop.bus.publish(Paid()),
            shop.bus.dead.find,
            lambda: shop.bus.stream(Paid).__aenter__(),
            lambda: shop.bus.running().__aenter__(),
        ):
            try:
                await call()
            except WrongLoopError as error:
                errors.append(error.where)
        await shop.bus.publish(Sent())
        return await shop.bus.send(Double(number=4))

    async with shop.bus.running() as bus:
        thread = threading.Thread(target=lambda: results.append(anyio.run(elsewhere, backend=backend)))
        results = list[int]()
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        assert [8] == results
        assert ["another event loop"] * 3 == errors[:3]
        assert len(errors) == 4
        await bus.publish(Paid(number=1))
    assert [(1, 1)] == shop.seen


async def test_in_a_forked_child() -> None:
    """A child forked while the bus runs is refused what the bus is needed for, and the parent is unharmed."""
    shop = Shop()
    async with shop.bus.running() as bus:
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            told = list[str]()
            for name, call in (
                ("publish", lambda: shop.bus.publish(Paid(number=9))),
                ("dead", shop.bus.dead.find),
                ("stream", lambda: shop.bus.stream(Paid).__aenter__()),
                ("running", lambda: shop.bus.running().__aenter__()),
                ("send", lambda: shop.bus.send(Double(number=4))),
            ):
                try:
                    call().send(None)
                except WrongLoopError as error:
                    told.append(f"{name}: {error.where}")
                except StopIteration as returned:
                    told.append(f"{name}: {returned.value}")
                except BaseException as error:
                    told.append(f"{name}: {error!r}")
            os.write(write, "\n".join(told).encode())
            os._exit(0)
        os.close(write)
        told = os.read(read, 10_000).decode().splitlines()
        os.close(read)
        assert os.waitpid(child, 0)[1] == 0  # noqa: ASYNC222
        fork = "a forked child process"
        assert [f"publish: {fork}", f"dead: {fork}", f"stream: {fork}"] == told[:3]
        assert told[3] == f"running: {fork}"
        assert told[4] == "send: 8"
        await bus.publish(Paid(number=1))
    assert [(1, 1)] == shop.seen


@pytest.mark.parametrize("how", ["raise KeyboardInterrupt", "os.kill(os.getpid(), signal.SIGINT)"])
def test_interrupt_in_a_handler_ends_the_process(how: str, anyio_backend_name: str) -> None:
    """Somebody at the keyboard ends the process with an exit code that says so, not with a dead message."""
    program = f"""
        import os, signal, anyio
        from eventbus import Event, EventBus, Limits, Module
        class Paid(Event): ...
        module = Module("m")
        @module.on(Paid)
        async def paid(event: Paid) -> None:
            {how}
            await anyio.sleep_forever()
        async def main() -> None:
            async with EventBus(module, routes={{Paid: "memory"}}, limits=Limits(drain=0.2)).running() as bus:
                await bus.publish(Paid())
                await anyio.sleep(20)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs in the background may have it ignored
        anyio.run(main, backend={anyio_backend_name!r})
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, timeout=30, check=False, text=True
    )
    assert ran.returncode not in (0, None)
    assert "KeyboardInterrupt" in ran.stderr


# links that break


class Web:
    """Run a shop over a flaky transport, on a clock that stands still."""

    def __init__(self, transport: Flaky, **options: Any) -> None:
        self.transport = transport
        self.clock = VirtualClock()
        self.shop = Shop(routes={Paid: "events"}, transports={"events": transport}, **options)
        self.bus = self.shop.bus

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Web"]:
        """Run for a while."""
        with self.bus.rewired(Runtime(self.clock, random=Random(0))):
            async with self.bus.running():
                yield self

    async def pass_time(self, seconds: float) -> None:
        """Move on, stopping at every due time."""
        target = self.clock.monotonic() + seconds
        await self.turns()
        while (due := self.clock.next_due()) is not None and due <= target:
            self.clock.jump(due)
            await self.turns()
        self.clock.jump(target)
        await self.turns()

    async def turns(self) -> None:
        """Let everybody else go on until they wait for something."""
        for _ in range(40):
            await checkpoint()

    async def publish(self, *numbers: int) -> None:
        """Publish so many, each patiently: again whenever the link was lost."""
        for number in numbers:
            while True:
                try:
                    await self.bus.publish(Paid(number=number))
                except Lost:
                    await self.turns()
                else:
                    break


@pytest.mark.parametrize("place", ["open", "declare", "subscribe", "receive", "publish"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
async def test_bus_over_a_link_that_breaks(place: str, number: int) -> None:
    """Wherever the link breaks, everything published arrives, and nothing is counted as failed."""
    transport = Flaky(retry=60.0)
    transport.trouble[place] = at(number, number + 1)
    async with Web(transport).open() as web:
        async with anyio.create_task_group() as group:
            group.start_soon(web.publish, *range(10))
            for _ in range(10):
                await web.pass_time(1)
        if place == "open":
            transport.lose()
        await web.pass_time(40)
        assert set(range(10)) == set(web.shop.done)
        assert web.bus.health().healthy
    assert [] == transport.settled("reject")
    assert [] == [entry for entry in transport.log if entry[0] == "retry" and entry[3] > 0]


async def test_bus_starts_while_its_broker_is_away() -> None:
    """A broker that is down at the start pauses its destination: the bus runs, health is red, then all is handled."""
    transport = Flaky()
    transport.trouble["open"] = lambda _: Lost("away")
    async with Web(transport).open() as web:
        report = web.bus.health()
        assert (False, "running") == (report.healthy, report.state)
        assert {"events": False} == dict(report.transports)
        assert [False] == [source.connected for source in report.sources.values()]
        async with anyio.create_task_group() as group:
            group.start_soon(web.publish, 1)
            await web.pass_time(3)
            transport.trouble = {}
            await web.pass_time(15)
        assert [1] == web.shop.done
        assert web.bus.health().healthy
        await web.bus.send(Double(number=1))


async def declared_as_ordered(**options: Any) -> set[tuple[str, str]]:
    transport = Flaky()
    async with Web(transport, **options).open():
        return {*transport.ordered}


async def test_a_broker_is_told_who_wants_order() -> None:
    """The group of an ordered handler is declared as ordered; with a store that is the group that takes it in."""
    assert await declared_as_ordered() == set()
    assert await declared_as_ordered(handler={"ordered": True}) == {("t.paid", "shop/m.paid")}
    assert await declared_as_ordered(handler={"ordered": True}, store="memory://") == {("t.paid", "shop")}


async def test_retries_are_held_where_the_transport_cannot() -> None:
    """Without delays of its own a transport keeps the message with us, extended, until its next attempt."""
    transport = Flaky(retry=0.0, returns="lease")
    web = Web(transport, handler={"retry": Retry(attempts=3, initial=20, maximum=100, jitter=False)})
    times = list[float]()

    async def fails(event: Paid) -> None:
        times.append(web.clock.monotonic())
        raise ValueError

    web.shop.action = fails
    async with web.open():
        await web.publish(1)
        await web.pass_time(100)
    assert [0, 20, 60] == times
    assert [(1, 1), (1, 2), (1, 3)] == web.shop.seen
    assert 5 <= len(transport.settled("extend")) <= 6
    assert len(transport.settled("reject")) == 1
    assert [] == transport.settled("retry")


async def test_delays_are_held_where_the_transport_cannot() -> None:
    """A delayed message waits here as well, and has all its attempts."""
    web = Web(Flaky(retry=0.0), handler={"retry": Retry(attempts=2, initial=1, jitter=False)})
    times = list[float]()

    async def fails(event: Paid) -> None:
        times.append(web.clock.monotonic())
        raise ValueError

    web.shop.action = fails
    async with web.open():
        await web.bus.publish(Paid(number=1), delay=60)
        await web.pass_time(100)
    assert [60, 61] == pytest.approx(times, abs=0.01)
    assert [(1, 1), (1, 2)] == web.shop.seen


async def test_ordered_followers_do_not_keep_other_keys_out() -> None:
    """Behind a failing head a hundred messages of its key wait here, and another key's are handled."""
    web = Web(
        Flaky(retry=0.0),
        handler={"ordered": True, "concurrency": 1, "retry": Retry(attempts=3, initial=20, maximum=100, jitter=False)},
    )

    async def fails(event: Paid) -> None:
        if event.number == 0:
            raise ValueError

    web.shop.action = fails
    async with web.open():
        for number in range(101):
            await web.bus.publish(Paid(number=number))
        await web.bus.publish(Paid(number=999, account="b"))
        await web.turns()
        assert [999] == web.shop.done
        await web.pass_time(100)
        for _ in range(10):
            await web.turns()
        assert [999, *range(1, 101)] == web.shop.done


async def test_one_broken_link_leaves_the_others_alone() -> None:
    """While one transport is down the messages of another are handled."""
    broken, sound = Flaky(), Flaky()
    module, seen = Module("m"), list[str]()

    @module.on(Paid)
    async def paid(event: Paid) -> None:
        seen.append("paid")

    @module.on(Sent)
    async def sent(event: Sent) -> None:
        seen.append("sent")

    broken.trouble["open"] = lambda _: Lost("away")
    bus = EventBus(
        module, name="shop", transports={"a": broken, "b": sound}, routes={Paid: "a", Sent: "b"},
        limits=Limits(connect=0.01),
    )  # fmt: skip
    async with bus.running():
        await bus.publish(Sent())
        await until(lambda: seen)
        with pytest.raises(Lost, match="'a' has not been reachable"):
            await bus.publish(Paid())
        assert {"a": False, "b": True} == dict(bus.health().transports)
    assert ["sent"] == seen
