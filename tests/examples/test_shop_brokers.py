"""The same shop without a broker and on each: a file of data is what differs, and nothing that happens."""

import re
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import anyio
import httpx
import pytest
from anyio import to_thread
from anyio.abc import TaskStatus

from eventbus import config
from eventbus.transport import Subscription, connect
from tests.examples.conftest import EXAMPLES, serve
from tests.servers.server import Server

ORDERS = 50
FACTS = {"placed": ORDERS, "reserved": ORDERS, "charged": ORDERS, "emailed": ORDERS, "failed": 0, "dead": 0}
CLEAN = {"working": False, "lost": 0, "doubled": 0, "repeated": 0}
TOPIC = "shop.order_placed"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio, which is what the brokers' clients need."""
    return "asyncio"


def sources() -> dict[str, str]:
    """Return what the shop's Python is, file by file."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in (EXAMPLES / "shop").glob("*.py")}


@asynccontextmanager
async def another_service(url: str) -> AsyncIterator[Subscription]:
    """Yield what a group that is not the shop's gets from the broker."""
    async with connect(url) as transport:
        await transport.declare(TOPIC, ["auditors"])
        async with transport.subscribe(TOPIC, group="auditors", prefetch=ORDERS, lease=60.0) as subscription:
            yield subscription


async def watch(
    client: httpx.AsyncClient, told: set[str], *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Note what the page is told, until the shop closes."""
    async with client.stream("GET", "/events", timeout=None) as answer:
        async for line in answer.aiter_lines():
            if line == ": open":
                task_status.started()
            elif line.startswith("event: "):
                told.add(line.removeprefix("event: "))


async def through(client: httpx.AsyncClient) -> dict[str, Any]:
    """Ask the shop how it is until all is done, or for a minute and a half."""
    until = time.monotonic() + 90
    while True:
        now: dict[str, Any] = (await client.get("/state")).json()
        if (FACTS.items() <= now.items() and not now["ledger"]["working"]) or time.monotonic() > until:
            return now
        await anyio.sleep(0.1)  # between two questions to another process


@pytest.mark.timeout(300)  # with the start of the server
@pytest.mark.parametrize("broker", [None, "redis", "rabbitmq", "nats", "kafka"])
async def test_same_shop(
    broker: str | None, data: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every order has every effect once, wherever its event went and whichever process handled it."""
    code, told, auditors = sources(), set[str](), None
    orders = [
        {
            "order_id": str(UUID(int=number)),
            "customer": f"{number}@example.org",
            "sku": "mug",
            "quantity": number % 5 + 1,
        }
        for number in range(ORDERS)
    ]
    async with AsyncExitStack() as stack:
        if broker is not None:
            server: Server = request.getfixturevalue("valkey" if broker == "redis" else broker)
            file = EXAMPLES / "shop" / f"{broker}.toml"
            monkeypatch.setenv(f"EVENTBUS_{broker.upper()}", urlsplit(server.url).netloc)
            monkeypatch.setenv("EVENTBUS_CONFIG", str(file))
            auditors = await stack.enter_async_context(another_service(config.read(file).transports["events"].value))
        shop = await to_thread.run_sync(serve, "--port", "0", "--data", str(data))
        try:
            async with httpx.AsyncClient(base_url=shop.url, timeout=30) as client, anyio.create_task_group() as tasks:
                await tasks.start(watch, client, told)
                for order in orders:
                    assert (await client.post("/orders", json=order)).status_code == 201
                now = await through(client)
                wiring = (await client.get("/wiring")).text
                shop.process.terminate()  # once: a second signal may find nobody left who would catch it
        except BaseException:
            shop.process.terminate()
            raise
        finally:
            _, errors = await to_thread.run_sync(shop.process.communicate)
        assert shop.process.returncode == 0, errors
        assert {name: now[name] for name in FACTS} == FACTS, errors
        assert {name: now["ledger"][name] for name in CLEAN} == CLEAN, errors
        assert told == {"OrderPlaced", "StockReserved", "OrderCharged", "EmailSent"}, errors
        with closing(sqlite3.connect(data / "shop.db")) as database:
            effects = {
                name: sorted(database.execute(f"SELECT * FROM {name}")) for name in ("stock", "payments", "emails")
            }
            unheard = {id for (id,) in database.execute("SELECT message_id FROM orders")}
        customers = [(order["order_id"], order["customer"]) for order in orders]
        stock = [(order["order_id"], order["sku"], order["quantity"]) for order in orders]
        assert effects == {"stock": stock, "payments": customers, "emails": customers}
        assert f"payments.charge_payment [{'events' if broker else 'store'}, 5 attempts, ordered" in wiring
        with anyio.fail_after(30):
            while auditors and unheard:
                delivery = await auditors.receive()
                await delivery.ack()
                unheard.discard(delivery.wire.id)
    assert sources() == code


@pytest.mark.parametrize("broker", ["redis", "rabbitmq", "nats", "kafka"])
def test_compose(broker: str) -> None:
    """In Docker, each broker is one fixed version, on this machine only, where the shop's file looks for it."""
    services = dict(re.findall(r"(?ms)^  (\w+):\n((?:    .*?\n)+)", (EXAMPLES.parent / "compose.yaml").read_text()))
    assert set(services) == {"redis", "rabbitmq", "nats", "kafka", "postgres", "mariadb"}
    for service in services.values():
        assert re.search(r"image: [\w/]+:\d+\.\d+(\.\d+)?\n", service)
        assert re.search(r'ports: \["127\.0\.0\.1:(\d+):\1"\]', service)
    addresses = config.read(EXAMPLES / "shop" / f"{broker}.toml", {}).transports.values()
    for address in addresses:
        assert f'"127.0.0.1:{urlsplit(address.value).port}:' in services[broker]
