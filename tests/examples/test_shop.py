"""The example shop, without a browser: on a bus of its own in memory, and in a process of its own."""

import re
import signal
import socket
import time
from typing import Any

import anyio
import httpx
import pytest
from shop.app import PAGE, app, bus
from shop.inventory import get_stock
from shop.messages import OrderPlaced, ShopClosed
from shop.notifications import get_mail
from shop.orders import get_orders
from shop.payments import get_till

from eventbus.testing.harness import Harness, harness
from tests.examples.conftest import Served, serve

ORDER = {"customer": "ada@example.org", "sku": "mug", "quantity": 2}
STEPS = ("placed", "reserved", "charged", "emailed")


@pytest.fixture(autouse=True)
def empty() -> None:
    """Begin with an empty shop."""
    for get in (get_orders, get_stock, get_till, get_mail):
        get.cache_clear()


async def state(t: Harness) -> dict[str, Any]:
    answer: dict[str, Any] = (await t.client.get("/state")).json()
    return answer


async def test_order_is_answered_before_it_is_handled() -> None:
    """An order is answered with its id at once; stock, payment and e-mail follow, once each."""
    async with harness(bus, app=app) as t:
        answers = [await t.client.post("/orders", json=ORDER) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [201] * 3
        assert [(await state(t))[step] for step in STEPS] == [3, 0, 0, 0]
        await t.settled()
        assert [(await state(t))[step] for step in STEPS] == [3] * 4
        assert {str(event.order_id) for event in t.published(OrderPlaced)} == {answer.json() for answer in answers}


async def test_nonsense_is_no_order() -> None:
    """An order that cannot be is refused, and nothing is published."""
    async with harness(bus, app=app) as t:
        assert (await t.client.post("/orders", json=ORDER | {"quantity": 0})).status_code == 422
        assert not t.published(OrderPlaced)


async def test_broken_email_dies_and_is_replayed() -> None:
    """While e-mail is broken it is tried three times and kept with its reason; replaying heals it, and only it."""
    async with harness(bus, app=app) as t:
        await t.client.put("/email", json={"works": False})
        for _ in range(3):
            await t.client.post("/orders", json=ORDER)
        await t.settled()
        broken = await state(t)
        assert (broken["failed"], broken["dead"], broken["email_works"]) == (3, 0, False)
        await t.advance(5)
        broken = await state(t)
        assert [broken[step] for step in STEPS] == [3, 3, 3, 0]
        assert (broken["failed"], broken["dead"]) == (9, 3)
        assert broken["latest"][0]["handler"] == "shop/notifications.send_email"
        assert "the mail server refuses connections" in broken["latest"][0]["reason"]
        assert len(t.dead) == 3
        assert (await t.client.post("/replay")).json() == 3
        await t.settled()
        healed = await state(t)
        assert [healed[step] for step in STEPS] == [3] * 4
        assert (healed["dead"], healed["email_works"]) == (0, True)


async def test_page_hears_what_happens() -> None:
    """The stream tells every step and every failed attempt, and ends when the shop closes."""
    heard: list[str] = []

    async def listen(client: httpx.AsyncClient) -> None:
        answer = await client.get("/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        heard.extend(re.findall(r"^event: (\w+)$", answer.text, re.MULTILINE))

    async with harness(bus, app=app) as t, anyio.create_task_group() as group:
        group.start_soon(listen, t.client)
        await anyio.wait_all_tasks_blocked()
        assert bus.engine.live.streams
        await t.client.post("/orders", json=ORDER)
        await t.settled()
        await t.client.put("/email", json={"works": False})
        await t.client.post("/orders", json=ORDER)
        await t.settled()
        await t.advance(5)
        await t.publish(ShopClosed())
        assert t.dead
    assert sorted(set(heard)) == ["EmailSent", "HandlingFailed", "OrderCharged", "OrderPlaced", "StockReserved"]
    assert heard.count("HandlingFailed") == 3
    assert not bus.engine.live.streams


async def test_page_needs_nobody_else() -> None:
    """The page comes with all it needs, and the wiring can be read beside it."""
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", PAGE.read_text())
    async with harness(bus, app=app) as t:
        assert (await t.client.get("/")).headers["content-type"].startswith("text/html")
        assert "payments.charge_payment [memory, 5 attempts, ordered" in (await t.client.get("/wiring")).text
        assert (await t.client.get("/health/bus")).status_code == 200


def test_served(served: Served) -> None:
    """Served, the shop says where it is and who handles what, sells, and ends at once and in peace when told to."""
    assert "event shop.order_placed, key order_id -> memory" in served.printed
    with httpx.Client(base_url=served.url) as client, client.stream("GET", "/events"):
        for _ in range(10):
            assert client.post("/orders", json=ORDER).status_code == 201
        until = time.monotonic() + 20
        while (now := client.get("/state").json())["emailed"] < 10 and time.monotonic() < until:
            time.sleep(0.05)
        assert [now[step] for step in STEPS] == [10] * 4
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(10) == 0
    assert served.process.communicate() == ("", "")


def test_next_port_is_taken() -> None:
    """A port that is taken is left to whoever has it: the shop opens at a later one."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        shop = serve("--port", str(port))
        shop.process.send_signal(signal.SIGINT)
        assert shop.process.wait(10) == 0
        shop.process.communicate()
    assert int(shop.url.rpartition(":")[2]) > port
