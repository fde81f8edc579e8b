"""A server of NATS ends twice under load, and every confirmed message arrives."""

import os
from collections.abc import Callable

import anyio
import pytest
from anyio.abc import TaskGroup

from eventbus.clock import Runtime, new_id
from eventbus.errors import Lost, PublishError, SettleError
from eventbus.limits import Limits
from eventbus.link import Link
from eventbus.testing.exam_bench import letters, until
from eventbus.transport import Delivery, Subscription, connect
from tests.servers.server import Server

pytestmark = pytest.mark.timeout(240)

MESSAGES = int(os.environ.get("EVENTBUS_LOAD", "2000"))
"""How many messages are under way: 10,000 where there is time."""
PUBLISHERS = 100


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client knows no other."""
    return "asyncio"


class Load:
    """Publish and consume over one link; a third of the messages waits for each restart."""

    def __init__(self, link: Link, topic: str) -> None:
        self.link = link
        self.topic = topic
        self.todo = [*enumerate(letters(MESSAGES))][::-1]
        self.confirmed: set[str] = set()
        self.arrived: list[str] = []
        self.lives: list[Subscription] = []
        self.restarts = 0
        link.topics[topic] = ("g",)

    async def publish(self) -> None:
        while self.todo:
            number, wire = self.todo.pop()
            third = number * 3 // MESSAGES
            await until(lambda third=third: third <= self.restarts, 120.0, "no restart came")
            while wire.id not in self.confirmed:
                try:
                    await self.link.publish(self.topic, [wire])
                    self.confirmed.add(wire.id)
                except (Lost, PublishError):
                    await anyio.sleep(0.05)

    async def consume(self, tasks: TaskGroup) -> None:
        while True:
            try:
                async with self.link.subscribe(
                    self.topic, group="g", prefetch=50, lease=5.0, ordered=False
                ) as subscription:
                    self.lives.append(subscription)
                    while True:
                        delivery = await subscription.receive()
                        self.arrived.append(delivery.wire.id)
                        tasks.start_soon(self.ack, delivery)
            except Lost:
                await anyio.sleep(0.05)

    async def ack(self, delivery: Delivery) -> None:
        try:
            await delivery.ack()
        except SettleError:
            assert self.restarts

    def is_busy(self, life: int) -> bool:
        """Tell whether messages come and go in this life of the server, its last ones maybe in the one before."""
        return len(self.confirmed) >= life * MESSAGES // 4 and len(self.lives) >= life and bool(self.arrived)

    def is_through(self) -> bool:
        return not self.confirmed - {*self.arrived} and len(self.lives) >= 3


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_a_server_that_ends_twice_under_load_loses_nothing(nats: Server, end: str) -> None:
    load = Load(Link("nats", connect(nats.url), Runtime(), Limits(connect=30.0)), f"load.{new_id()}")
    ending: Callable[[], None] = getattr(nats, end)
    async with anyio.create_task_group() as tasks:
        await tasks.start(load.link.keep)
        tasks.start_soon(load.consume, tasks)
        async with anyio.create_task_group() as publishers:
            for _ in range(PUBLISHERS):
                publishers.start_soon(load.publish)
            for life in (1, 2):
                await until(lambda life=life: load.is_busy(life), 60.0, "nothing moves")
                load.restarts = life
                await anyio.to_thread.run_sync(ending)
                nats.start()  # in this thread: the server would end with any other
        await until(load.is_through, 60.0, "not all that was confirmed has arrived")
        tasks.cancel_scope.cancel()
    assert len(load.lives) == 3
    assert {*load.arrived} == load.confirmed
    assert len(load.confirmed) == MESSAGES
    assert len(load.arrived) < MESSAGES * 1.5
