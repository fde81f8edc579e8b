"""Prove P2, P3, P5 and P9 on every broker: while it is away, and while its workers are killed."""

import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from eventbus import Context, EventBus, Limits, Module, Transaction
from eventbus.clock import new_id
from eventbus.errors import TransportError
from eventbus.transport import connect
from tests.crash.child import main
from tests.crash.family import FORKS
from tests.crash.site import until
from tests.crash.worker import SLOTS, Work, made_by, play
from tests.servers.rabbitmq import AGE
from tests.servers.server import Server, wait_until

pytestmark = [pytest.mark.crash, pytest.mark.timeout(400 + int(os.environ.get("EVENTBUS_MESSAGES", "0")) // 20)]

OUTAGE = float(os.environ.get("EVENTBUS_OUTAGE", "5"))
"""Seconds that a broker is down; 120 where there is time."""
BROKERS = ("redis", "nats", "rabbitmq", "kafka")
PATIENCE = 60.0


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> Iterator[tuple[Server, str]]:
    """Yield every broker there is, and its URL."""
    kind: str = request.param
    server: Server = request.getfixturevalue("valkey" if kind == "redis" else kind)
    server.start()
    yield server, f"{server.url}?partitions=4" if kind == "kafka" else server.url
    server.start()


@pytest.fixture
def name() -> str:
    """Return a name that no bus and no topic had before."""
    return f"crash-{new_id()}"


def rows(file: Path, statement: str) -> list[Any]:
    """Return what a query finds."""
    with closing(sqlite3.connect(file)) as link:
        return [*link.execute(statement)]


async def test_an_outage_delays_and_nothing_else(broker: tuple[Server, str], name: str, tmp_path: Path) -> None:
    """While the broker is down publishing through the store goes on and counts no failure; then all arrives, once."""
    server, url = broker
    made, module, attempts = made_by(name), Module("m"), Counter[int]()

    @module.on(made)
    async def note(event: made, ctx: Context, tx: Transaction[Any]) -> None:
        attempts[event.number] = ctx.attempt

    bus = EventBus(
        module, name=name, store=f"sqlite:///{tmp_path}/s.db", transports={"events": url}, routes={made: "events"},
        limits=Limits(lease=6.0, sweep=0.2),
    )  # fmt: skip
    sent = 0
    async with bus.running():

        async def publish(count: int) -> None:
            nonlocal sent
            for _ in range(count):
                async with bus.transaction():
                    await bus.publish(made(number=sent))
                sent += 1

        await publish(10)
        await until(lambda: len(attempts) == sent, PATIENCE)
        await anyio.sleep(AGE)
        await anyio.to_thread.run_sync(server.kill)
        back = anyio.current_time() + OUTAGE
        while anyio.current_time() < back:
            await publish(10)
            await anyio.sleep(0.2)
        before = sent
        assert len(attempts) < sent
        await anyio.to_thread.run_sync(server.start)
        await until(lambda: len(attempts) == before, PATIENCE + OUTAGE)
        assert await bus.dead.find() == []
    assert set(attempts.values()) == {1}
    assert rows(tmp_path / "s.db", "SELECT MAX(failures) FROM eventbus_entry") == [(0,)]
    print(f"\n{OUTAGE:g} s, {sent} events")


async def test_without_a_store_an_outage_is_an_error_and_nothing_is_sent_in_parts(
    broker: tuple[Server, str], name: str
) -> None:
    """While the broker is down who publishes is told in time, and what was refused does not turn up later."""
    server, url = broker
    made, topic = made_by(name), f"{name}.made"
    bus = EventBus(
        Module("m", messages=[made]), name=name, transports={"events": url}, routes={made: "events"},
        limits=Limits(connect=3.0),
    )  # fmt: skip
    async with connect(url) as transport:
        await transport.declare(topic, ["g"])
    async with bus.running(consume=False):
        await bus.publish(made(number=1))
        await anyio.sleep(AGE)
        await anyio.to_thread.run_sync(server.kill)
        for _ in range(3):
            with anyio.fail_after(20.0), pytest.raises(TransportError):
                await bus.publish_many([made(number=2), made(number=3)])
        await anyio.to_thread.run_sync(server.start)
        with anyio.fail_after(PATIENCE):
            while True:
                try:
                    await bus.publish(made(number=4))
                    break
                except TransportError:
                    await anyio.sleep(0.1)
    got: list[bytes] = []
    async with connect(url) as transport, transport.subscribe(topic, group="g", prefetch=9, lease=6.0) as subscription:
        with anyio.move_on_after(PATIENCE):
            while not any(b"4" in body for body in got):
                delivery = await subscription.receive()
                got.append(delivery.wire.body)
                await delivery.ack()
            with anyio.move_on_after(1.0):
                got.append((await subscription.receive()).wire.body)
    assert sorted(got) == [b'{"number":1}', b'{"number":4}']


@pytest.mark.parametrize(
    ("broker", "stored"),
    [(kind, stored) for kind in BROKERS for stored in (True, False) if stored or kind != "kafka"],
    indirect=["broker"],
)
def test_a_killed_worker_loses_nothing(
    broker: tuple[Server, str], name: str, tmp_path: Path, stored: bool, kills: int, messages: int
) -> None:
    """After kills under load every event has its effect: one with a store, else more only within the slots.

    A handler takes from Kafka by way of a store only, since Kafka counts no deliveries.
    """
    _, url = broker
    count, deaths = messages // 2, max(kills // 100, 2)
    patience = PATIENCE + count / 50
    file = tmp_path / "s.db"
    if stored:
        rows(file, "CREATE TABLE effects (number INTEGER NOT NULL)")
    work = Work(directory=tmp_path, broker=url, name=name, store=f"sqlite:///{file}" if stored else None)
    lines = Lines(tmp_path)
    for death in range(deaths + 1):
        process = FORKS.Process(target=main, args=(play, tmp_path, work), daemon=True)
        process.start()
        try:
            wait_until(lambda: lines("ready") > death, PATIENCE, "a worker did not come up")  # noqa: B023
            if not death:
                anyio.run(publish, work, count)
            if death < deaths:
                part = count * (death + 1) // (deaths + 2)
                wait_until(lambda: lines("started") >= part, patience, "nothing is handled")  # noqa: B023
            else:
                effects: Callable[[], list[int]] = lines.effects if not stored else lambda: stored_effects(file)
                wait_until(lambda: len({*effects()}) >= count, patience, "not everything was handled")  # noqa: B023
        finally:
            process.kill()
            process.join(10)
        assert process.exitcode == -signal.SIGKILL
    assert {*effects()} == {*range(count)}
    repeated = lines("started") - count
    print(f"\n{deaths} kills, {count} events, {repeated} started again, {len(effects()) - count} effects too many")
    assert repeated <= deaths * SLOTS
    if stored:
        assert len(effects()) == count


def stored_effects(file: Path) -> list[int]:
    """Return what the transactions of the handlers have left."""
    return [number for (number,) in rows(file, "SELECT number FROM effects")]


class Lines:
    """Count what workers have noted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, name: str) -> int:
        return len(self.read(name))

    def effects(self) -> list[int]:
        """Return the effects that are lines."""
        return [int(line) for line in self.read("effects")]

    def read(self, name: str) -> list[str]:
        """Return whole lines."""
        path = self.directory / f"{name}.txt"
        return path.read_text().splitlines() if path.exists() else []


async def publish(work: Work, count: int) -> None:
    """Publish to the worker, from a bus that handles nothing."""
    made = made_by(work.name)
    bus = EventBus(
        Module("source", messages=[made]), name=f"{work.name}-source", transports={"events": work.broker},
        routes={made: "events"},
    )  # fmt: skip
    async with bus.running(consume=False):
        for start in range(0, count, 50):
            await bus.publish_many([made(number=number) for number in range(start, min(start + 50, count))])
