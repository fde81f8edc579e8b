"""Signatures around a transport, as docs/guides/signing.md has them (S10)."""

import re
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from eventbus import Event, EventBus, Module
from eventbus.clock import new_id
from eventbus.transport import Wire, connect
from tests.doubles import Flaky
from tests.servers.server import Server

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "signing.md").read_text()
OLD, NEW = {"a": b"the old secret"}, {"b": b"the new secret"}

scope: dict[str, Any] = {}
exec(compile(re.findall(r"(?ms)^```python\n(.*?)^```", GUIDE)[0], "signing.md", "exec"), scope)
signed = scope["Signed"]


class Paid(Event, name="signing.paid", key="number"):
    number: int


def forgeries(wire: Wire) -> list[Wire]:
    """Return a wire with each bit of its body turned, each header changed, or left out, another key, another id."""
    bits = [(place, 1 << bit) for place in range(len(wire.body)) for bit in range(8)]
    bodies = [bytes([*wire.body[:at], wire.body[at] ^ bit, *wire.body[at + 1 :]]) for at, bit in bits]
    headers = [{**wire.headers, name: text + "0"} for name, text in wire.headers.items()]
    headers += [{other: wire.headers[other] for other in wire.headers if other != name} for name in wire.headers]
    headers += [{**wire.headers, "more": "1"}, {**wire.headers, "signature": "c:" + wire.headers["signature"][2:]}]
    return [
        *(replace(wire, body=body) for body in bodies),
        *(replace(wire, headers=one) for one in headers),
        replace(wire, key="8"),
        replace(wire, key=None),
        replace(wire, id="another"),
    ]


async def test_s10_what_was_changed_on_its_way_is_dead() -> None:
    """Each bit of it counts; a key holds until it is retired; what is not signed, or by nobody known, is refused."""
    broker, module, handled = Flaky(), Module("m"), list[int]()
    done = anyio.Event()

    @module.on(Paid)
    async def book(event: Paid) -> None:
        handled.append(event.number)
        if event.number == 9:
            done.set()

    async def run(keys: dict[str, bytes], wires: list[Wire]) -> list[tuple[Any, ...]]:
        bus = EventBus(module, name="m", transports={"out": signed(broker, keys)}, routes={Paid: "out"})
        (queue,) = broker.queues.values() if broker.queues else [deque[tuple[Wire, int]]()]
        queue.extend((wire, 0) for wire in wires)
        async with bus.running():
            await bus.publish(Paid(number=9), atomic=False)
            with anyio.fail_after(10):
                await done.wait()
        return [entry[3:] for entry in broker.log if entry[0] == "reject"]

    assert await run(OLD, []) == []
    published = list[Wire]()

    async def keep(topic: str, wires: list[Wire]) -> None:
        published.extend(wires)

    for keys, number in ((OLD, 1), (NEW, 2)):
        catcher = Flaky()
        catcher.publish = keep  # type: ignore[method-assign, assignment]
        bus = EventBus(module, name="m", transports={"out": signed(catcher, keys)}, routes={Paid: "out"})
        async with bus.running(consume=False):
            await bus.publish(Paid(number=number), atomic=False)
    by_old, by_new = published
    forged = forgeries(by_old)
    done, before = anyio.Event(), len(handled)
    assert await run({**NEW, **OLD}, [*forged, by_old, by_new]) == [("bad signature",)] * len(forged)
    assert handled[before:] == [1, 2, 9]
    done = anyio.Event()
    assert len(await run(NEW, [by_old])) == len(forged) + 1
    assert handled[before:] == [1, 2, 9, 9]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("broker", ["valkey", "nats", "rabbitmq", "kafka"])
async def test_s10_every_broker_carries_a_signature(
    broker: str, anyio_backend: str, request: pytest.FixtureRequest
) -> None:
    """A signature holds through a broker and through a retry; what others put there never comes out."""
    server: Server = request.getfixturevalue(broker)
    topic, wire = f"test.{new_id()}", Wire(new_id(), b"{}", {"tenant": "Zo%C3%AB"}, "k")
    async with (
        connect(server.url) as stranger,
        signed(connect(server.url), NEW) as transport,
        transport.subscribe(topic, group="g", prefetch=5, lease=30.0) as subscription,
    ):
        await stranger.publish(topic, [replace(wire, id=new_id())])
        await transport.publish(topic, [wire])
        for _ in range(2):
            with anyio.fail_after(20):
                delivery = await subscription.receive()
            assert delivery.wire == wire
            await delivery.retry(0)
