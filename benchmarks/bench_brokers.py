"""Measure publishing to, and consuming from, each broker without a store, beside its ordinary client and FastStream."""

import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial

from anyio import fail_after

from benchmarks.bench_sqlite import Told, told
from benchmarks.floor_brokers import FLOORS
from benchmarks.laps import RATE, TASKS, Laps, Publish, spread
from benchmarks.measure import Effort, Goal, Row, Sample
from benchmarks.peer import Take, asking
from eventbus import EventBus, Module
from tests.servers import kafka, nats, rabbitmq, valkey
from tests.servers.server import AbsentError, Server

__all__ = ("rows",)

COUNT = 3_000
ASKED = 200
PATIENCE = 120.0
"""Seconds that one lap may take."""
OURS, CLIENT, PEER = "eventbus", "its client", "faststream"
RECIPES = {"redis": valkey.recipe, "rabbitmq": rabbitmq.recipe, "nats": nats.recipe, "kafka": kafka.recipe}
TITLES = {
    "redis": "Redis Streams",
    "rabbitmq": "RabbitMQ",
    "nats": "NATS JetStream",
    "kafka": "Kafka",
}
WORKS = {
    "publish": f"publish, {TASKS} tasks",
    "consume": f"consume, {TASKS} at once",
    "whole": "publish and consume meanwhile",
    "latency": f"from publish to handler, {RATE} a second, p50",
}
GOALS: dict[str, tuple[tuple[float, float], ...]] = {
    "redis": ((0.7, 4), (0.35, 10), (0.5, 7)),
    "rabbitmq": ((0.9, 1.2), (0.75, 2.4), (0.8, 1.2)),
    "nats": ((0.8, 1.4), (0.7, 2), (0.7, 1.5)),
}
"""Broker -> what publish, consume and both are to reach, of the client's and of the peer's rate."""
LATENCY = (1.3, 1)
Samples = dict[str, Sample]
"""Contender -> seconds of one message."""


@asynccontextmanager
async def opened(url: str, consume: bool, take: Callable[[], None]) -> AsyncGenerator[Publish]:
    """Open a bus without a store; Kafka, which counts no attempts, needs one to consume: that of another bus."""
    module, stored = Module("bench"), url.startswith("kafka")

    @module.on(Told, name="take", concurrency=TASKS)
    async def handle(_: Told) -> None:
        take()

    transports, routes = {"broker": url}, {Told: "broker"}
    bus = EventBus(
        module, name="bench", store="memory://" if stored else None, transports=transports, routes=routes
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(bus.running(consume=consume))
        publisher = bus
        if stored:
            publisher = EventBus(Module("bench", messages=[Told]), name="bench", transports=transports, routes=routes)
            await stack.enter_async_context(publisher.running(consume=False))
        yield lambda count: spread(count, lambda number: publisher.publish(told(number)))


def own(laps: Laps) -> Callable[[str, int], Take]:
    return lambda work, count: partial(getattr(laps, work), count)


async def measured(effort: Effort, contenders: Mapping[str, Callable[[str, int], Take]]) -> dict[str, Samples]:
    """Have every contender do each work once a round: what it publishes in one lap, it consumes in the next."""
    values: dict[str, dict[str, list[float]]] = {work: {name: [] for name in contenders} for work in WORKS}
    names = list(contenders)
    for _ in range(effort.some(3)):
        for work in WORKS:
            count = effort.of(ASKED if work == "latency" else COUNT)
            for name in names:
                with fail_after(PATIENCE):
                    values[work][name].append(await contenders[name](work, count)())
        names.append(names.pop(0))
    return {work: {name: Sample.of(some) for name, some in taken.items()} for work, taken in values.items()}


async def broker_rows(effort: Effort, broker: str, url: str) -> AsyncGenerator[Row]:
    async with asking(PEER, "brokers", broker, url) as asked:
        contenders = {OURS: own(Laps(partial(opened, url))), CLIENT: own(Laps(FLOORS[broker](url)))}
        if asked:
            contenders[PEER] = asked
        taken = await measured(effort, contenders)
    for place, (work, samples) in enumerate(taken.items()):
        least = work != "latency"
        where = ", by a memory store" if broker == "kafka" and work != "publish" else ""
        goals = GOALS[broker][place] if least and broker in GOALS else LATENCY if not least else (None, None)
        for rival, goal in zip((CLIENT, PEER), goals, strict=True):
            if rival in samples:
                yield Row(
                    f"{TITLES[broker]}{where}: {WORKS[work]}", samples[OURS], rival, samples[rival],
                    goal and Goal(goal, least=least), "/s" if least else "s",
                )  # fmt: skip


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons on the brokers that are there."""
    found: list[Row] = []
    for broker, recipe in RECIPES.items():
        with ExitStack() as stack:
            try:
                server = Server(recipe())
            except AbsentError as error:
                print(f"{broker} is left out: {error}", file=sys.stderr)
                continue
            stack.callback(server.close)
            server.start()
            found += [row async for row in broker_rows(effort, broker, server.url)]
    return found
