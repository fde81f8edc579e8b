"""Play one seed: start processes, let things go wrong for a while, then let everything come to its end."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from random import Random

import anyio
from anyio.lowlevel import checkpoint

from eventbus import EventBus
from eventbus.engine import Engine
from eventbus.errors import EventBusError
from eventbus.link import PAUSES
from eventbus.registry import Registry
from tests.simulation import schedule
from tests.simulation.broker import OTHERS, Link
from tests.simulation.database import Port
from tests.simulation.oracle import Violation
from tests.simulation.shop import PROCESS, Charge, Oops, Order, Place, Shape, Traits, door, draw, observe
from tests.simulation.world import Process, World

__all__ = ("Story", "play")

PATIENCE = 90.0
"""Virtual seconds in which something more settles once nothing goes wrong any more: a long lane takes its time."""


@dataclass(frozen=True)
class Story:
    """Be what happened in one run."""

    seed: int
    log: tuple[str, ...]
    violation: Violation | None

    def __str__(self) -> str:
        return "\n".join(self.log)


def play(seed: int, *, traits: Traits | None = None) -> Story:
    """Play a seed to its end and judge it; ``traits`` replaces what the seed would draw."""
    world = schedule.run(seed, partial(_play, seed, traits))
    return Story(seed, tuple(world.log), world.violation)


async def _play(seed: int, traits: Traits | None, random: Random) -> World:
    drawn = draw(random)
    world = World(seed, random, traits or drawn)
    try:
        with world.root:
            await _story(world)
    except* Violation:
        world.note("world", "is not as promised")
    return world


async def _story(world: World) -> None:
    async with world.broker.server, anyio.create_task_group() as group:
        for topic in world.traits.outward:
            await world.broker.server.declare(topic, (OTHERS,))
        for host in world.traits.hosts:
            group.start_soon(_keep, world, group, host)
        group.start_soon(_watch, world)
        await _nemesis(world)
        await _heal(world)
        await _close(world)
        world.oracle.final()
        world.note("world", "is at peace")
        group.cancel_scope.cancel()


async def _keep(world: World, group: anyio.abc.TaskGroup, host: str) -> None:
    """Be the supervisor of one host: start a process, and another one when it is gone."""
    number = 0
    while not world.closing:
        number += 1
        process = Process(world, host, number)
        world.processes.append(process)
        group.start_soon(_live, world, process)
        await process.gone.wait()
        world.processes.remove(process)
        await anyio.sleep(world.random.random() * 2)
        world.trouble()


async def _live(world: World, process: Process) -> None:
    """Be the main function of one process."""
    PROCESS.set(process)
    try:
        with _bus(process) as bus, process.scope:
            async with bus.running():
                process.bus, process.engine, process.up = bus, bus.engine, True
                world.note(process.name, "is up")
                async with anyio.create_task_group() as group:
                    group.start_soon(_requests, world, process, bus)
                    await process.stopping.wait()
                    group.cancel_scope.cancel()
    except EventBusError as error:
        world.note(process.name, f"could not start: {error}")
        await anyio.sleep(0.5)
    except Exception as error:
        world.violated(Violation(f"the lifetime of {process.name} ended in {error!r}"))
    process.up = False
    if process.alive:
        world.note(process.name, "is down")
        world.oracle.stopped(process)
        world.oracle.left(process)
    process.over.set()
    process.gone.set()


@cache
def _registry(shape: Shape) -> Registry:
    """Return a shape compiled: once, because its processes differ in nothing but whom they talk to."""
    world = World(0, Random(0), replace(draw(Random(0)), shape=shape))
    return _wired(Process(world, "a", 0)).engine.registry


def _wired(process: Process) -> EventBus:
    shape = process.world.traits.shape
    return EventBus(
        *shape.modules, door, name="sim", store=Port(process), transports={"broker": Link(process)},
        routes=shape.routes, middleware=[observe], limits=process.world.limits,
    )  # fmt: skip


@contextmanager
def _bus(process: Process) -> Generator[EventBus]:
    """Return the bus of one process, with its time, chance and ids."""
    bus = _wired(process)
    with bus.rewired(process.runtime):
        compiled = _registry(process.world.traits.shape)
        wiring = replace(bus.wiring, codec=compiled.wiring.codec)
        bus._engine = Engine(bus, replace(compiled, wiring=wiring), process.runtime)
        yield bus


async def _requests(world: World, process: Process, bus: EventBus) -> None:
    """Be the clients of one process."""
    for number in range(world.traits.requests):
        await anyio.sleep(world.random.random() * world.traits.length / world.traits.requests)
        await process.gate()
        if not world.faulty:
            return
        with anyio.CancelScope() as scope:
            process.requests.add(scope)
            try:
                await _request(world, process, bus, number)
            except (EventBusError, Oops) as error:
                world.note(process.name, f"request {number}: {type(error).__name__}")
            finally:
                process.requests.discard(scope)


async def _request(world: World, process: Process, bus: EventBus, number: int) -> None:
    chance, shape = world.random, world.traits.shape

    def order() -> Order:
        return Order(key=f"k{chance.randrange(world.traits.keys)}", number=number)

    kind = chance.randrange(6)
    if kind == 0:
        await bus.publish(order(), atomic=False)
    elif kind == 1:
        await bus.send(Place(key="k0", number=number))
    elif kind == 2 and shape.charges:
        async with bus.transaction() as tx:
            receipt = await bus.enqueue(Charge(key="k0", number=number))
            tx.session.write("order", receipt.id)
    elif kind == 3:
        async with bus.transaction() as tx:
            receipt = await bus.publish(order(), delay=chance.random() * 4)
            tx.session.write("order", receipt.id)
    else:
        async with bus.transaction() as tx:
            for receipt in await bus.publish_many([order() for _ in range(chance.choice((1, world.traits.burst)))]):
                tx.session.write("order", receipt.id)
            if chance.random() < 0.3:
                await _savepoint(bus, order(), fails=chance.random() < 0.5)
            if chance.random() < 0.2:
                raise Oops("the request fails")


async def _savepoint(bus: EventBus, event: Order, *, fails: bool) -> None:
    try:
        async with bus.transaction() as tx:
            receipt = await bus.publish(event)
            tx.session.write("order", receipt.id)
            if fails:
                raise Oops("the savepoint fails")
    except Oops:
        await checkpoint()


async def _watch(world: World) -> None:
    """Look at everything once a second."""
    while True:
        await anyio.sleep(1.0)
        world.oracle.tick()


async def _nemesis(world: World) -> None:
    """Let things go wrong."""
    end = anyio.current_time() + world.traits.length
    acts = {
        "crash": _crash, "stall": _stall, "forward": _forward, "back": _back, "outage": partial(_outage, "store"),
        "blackout": partial(_outage, "broker"), "restart": _restart, "terminate": _terminate, "operate": _operate,
    }  # fmt: skip
    async with anyio.create_task_group() as group:
        while anyio.current_time() < end:
            await anyio.sleep(world.random.random() * 2.0)
            if world.traits.faults:
                act = world.random.choice(world.traits.faults)
                group.start_soon(acts[act], world, name=f"nemesis {act}")


def _victim(world: World) -> Process | None:
    running = [process for process in world.processes if process.works]
    return world.random.choice(running) if running else None


async def _crash(world: World) -> None:
    process = _victim(world)
    if process is not None:
        world.note(process.name, "crashes")
        process.crash()


async def _stall(world: World) -> None:
    process = _victim(world)
    if process is None:
        return
    seconds = world.limits.lease * world.random.choice((0.2, 1.2, 2.5))
    world.note(process.name, f"stalls for {seconds:.1f} s")
    world.oracle.lapsed(process)
    process.freeze()
    await anyio.sleep(seconds)
    if process.frozen:
        world.oracle.lapsed(process)
        world.note(process.name, "goes on")
        world.trouble()
        process.thaw()


async def _forward(world: World) -> None:
    _jump(world, world.random.choice((1.0, 10.0, 3600.0)))


async def _back(world: World) -> None:
    if not world.ahead:
        _jump(world, -world.random.choice((1.0, 20.0, 3600.0)))


def _jump(world: World, seconds: float) -> None:
    world.note("world", f"sets the clock {seconds:+.0f} s")
    world.jump(seconds)


async def _outage(kind: str, world: World) -> None:
    seconds = world.random.choice((0.3, 3.0, 8.0))
    world.note("world", f"loses the {kind} for {seconds:.1f} s")
    world.outages[kind] += 1
    world.trouble()
    if kind == "broker":
        world.broker.disconnect(None)
    else:
        for process in world.processes:
            world.oracle.lapsed(process)
    await anyio.sleep(seconds)
    world.outages[kind] -= 1
    world.troubled = anyio.current_time() + PAUSES.maximum  # nobody has to look earlier


async def _restart(world: World) -> None:
    process = _victim(world)
    if process is not None:
        world.note(process.name, "is to stop")
        process.stop()


async def _terminate(world: World) -> None:
    process = _victim(world)
    if process is not None:
        world.note(process.name, "is cancelled")
        process.stop()
        process.scope.cancel()


async def _operate(world: World) -> None:
    process = _victim(world)
    if process is None:
        return
    handler = world.random.choice((*world.traits.transactional, *world.traits.blocking))
    verb = world.random.choice((process.bus.dead.replay, process.bus.dead.discard))
    try:
        world.note(process.name, f"{verb.__name__}s the dead of {handler}")
        await verb(handler=handler)
    except EventBusError as error:
        world.note(process.name, f"{verb.__name__}: {type(error).__name__}")


async def _heal(world: World) -> None:
    """Stop all faults, and wait until every entry is over."""
    world.faulty = False
    for process in world.processes:
        if process.frozen:
            world.oracle.lapsed(process)
            process.thaw()
    world.trouble()
    world.note("world", "is whole again")
    least = len(world.oracle.left_over())
    with anyio.move_on_after(PATIENCE) as scope:
        while not world.oracle.settled_all():
            await anyio.sleep(1.0)
            await _unblock(world)
            if (left := len(world.oracle.left_over())) < least:
                least, scope.deadline = left, anyio.current_time() + PATIENCE
    if scope.cancelled_caught:
        rest = f"{world.oracle.left_over()}, in hand: {world.oracle.in_hand()}"
        world.violated(Violation(f"invariant 2: nothing settles for {PATIENCE:.0f} s: {rest}"))


async def _unblock(world: World) -> None:
    """Be the operator who looks at what blocks a lane."""
    for process in world.working()[:1]:
        for handler in world.traits.blocking:
            await process.bus.dead.discard(handler=handler)


async def _close(world: World) -> None:
    """Stop all processes, as a deploy does."""
    world.closing = True
    for process in list(world.processes):
        process.stop()
        process.gone.set()
    for process in list(world.processes):
        await process.over.wait()
    leased = world.oracle.leased()
    if leased:
        world.violated(Violation(f"invariant 10: leased after all processes have stopped: {leased}"))
