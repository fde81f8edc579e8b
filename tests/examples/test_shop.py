"""The example shop, without a browser: on a file of its own in this process, and in processes of its own."""

import re
import signal
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import pytest
from shop import pace
from shop.app import PAGE, app, bus
from shop.messages import OrderPlaced, ShopClosed

from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing import Harness, harness
from tests.examples.conftest import Served, serve

ORDER = {"customer": "ada@example.org", "sku": "mug", "quantity": 2}
STEPS = ("placed", "reserved", "charged", "emailed")
CLEAN = {"working": False, "lost": 0, "redelivered": 0, "doubled": 0, "repeated": 0}
TAKEN_OVER = 12.0
"""Seconds that the work of a killed process rests."""


@pytest.fixture
async def t(tmp_path: Path) -> AsyncIterator[Harness]:
    """Run an empty shop."""
    async with harness(bus, app=app, store=SQLiteStore(tmp_path / "shop.db")) as t:
        yield t


async def state(t: Harness) -> dict[str, Any]:
    answer: dict[str, Any] = (await t.client.get("/state")).json()
    return answer


async def test_order_is_answered_before_it_is_handled(t: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order is answered with its id at once; stock, payment and e-mail follow, once each."""
    open_now = anyio.Event()

    async def wait(_seconds: float) -> None:
        await open_now.wait()

    monkeypatch.setattr(pace, "pause", wait)
    answers = [await t.client.post("/orders", json=ORDER) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201] * 3
    before = await state(t)
    assert [before[step] for step in STEPS[:3]] == [3, 0, 0]
    assert before["ledger"] == CLEAN | {"working": True}
    open_now.set()
    await t.settled()
    after = await state(t)
    assert [after[step] for step in STEPS] == [3] * 4
    assert after["ledger"] == CLEAN
    assert {str(event.order_id) for event in t.published(OrderPlaced)} == {answer.json() for answer in answers}


async def test_asking_again_is_no_second_order(t: Harness) -> None:
    """Who got no answer may ask again with the same id: there is one order, and it is published once."""
    order = ORDER | {"order_id": str(uuid4())}
    assert [(await t.client.post("/orders", json=order)).json() for _ in range(2)] == [order["order_id"]] * 2
    await t.settled()
    assert [(await state(t))[step] for step in STEPS] == [1] * 4
    assert t.published(OrderPlaced) == t.published(OrderPlaced, order_id=UUID(order["order_id"]))
    assert len(t.published(OrderPlaced)) == 1


async def test_nonsense_is_no_order(t: Harness) -> None:
    """An order that cannot be is refused, and nothing is published."""
    assert (await t.client.post("/orders", json=ORDER | {"quantity": 0})).status_code == 422
    assert not t.published(OrderPlaced)


async def test_broken_email_dies_and_is_replayed(t: Harness) -> None:
    """While e-mail is broken it is tried three times and kept with its reason; replaying heals it, and only it."""
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
    assert broken["ledger"] == CLEAN  # what sits among the dead is not lost
    assert len(t.dead) == 3
    assert (await t.client.post("/replay")).json() == 3
    await t.settled()
    healed = await state(t)
    assert [healed[step] for step in STEPS] == [3] * 4
    assert (healed["dead"], healed["email_works"], healed["ledger"]) == (0, True, CLEAN)


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        ("DELETE FROM stock WHERE rowid = 1", {"lost": 1}),
        ("DELETE FROM payments", {"lost": 2}),
        ("DELETE FROM emails WHERE rowid = 2", {"lost": 1}),
        ("INSERT INTO payments SELECT * FROM payments WHERE rowid = 1", {"doubled": 1}),
        ("INSERT INTO stock SELECT * FROM stock", {"doubled": 2}),
        ("INSERT INTO emails SELECT * FROM emails", {"repeated": 2}),
        (
            "UPDATE eventbus_entry SET claims = claims + 1, owner = 'the next' WHERE owner = 'killed'",
            {"redelivered": 6},
        ),
        ("UPDATE eventbus_entry SET state = 0, due_at = due_at + 9999999", {"working": True}),
        ("DELETE FROM payments; DELETE FROM eventbus_entry WHERE recipient LIKE '%charge_payment'", {"lost": 2}),
        (
            "DELETE FROM payments; UPDATE eventbus_entry SET recipient = 'shop>events' WHERE recipient LIKE '%payment'",
            {"working": True},
        ),
    ],
)
async def test_ledger_sees_damage(t: Harness, damage: str, seen: dict[str, Any]) -> None:
    """The ledger is a count of what is in the database, not a wish."""
    for _ in range(2):
        await t.client.post("/orders", json=ORDER)
    await t.settled()
    async with bus.transaction() as tx:
        await tx.session.execute("UPDATE eventbus_entry SET owner = 'killed'")
        for statement in damage.split(";"):
            await tx.session.execute(statement)
        await tx.session.execute("UPDATE eventbus_entry SET owner = NULL")
    assert (await state(t))["ledger"] == CLEAN | seen


async def test_page_hears_what_happens(t: Harness) -> None:
    """The stream tells every step and every failed attempt, and ends when the shop closes."""
    heard: list[str] = []

    async def listen() -> None:
        answer = await t.client.get("/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        heard.extend(re.findall(r"^event: (\w+)$", answer.text, re.MULTILINE))

    async with anyio.create_task_group() as group:
        group.start_soon(listen)
        while not bus.engine.live.streams:
            await anyio.lowlevel.checkpoint()
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


async def test_page_needs_nobody_else(t: Harness) -> None:
    """The page comes with all it needs, and the wiring can be read beside it."""
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", PAGE.read_text())
    assert (await t.client.get("/")).headers["content-type"].startswith("text/html")
    assert "payments.charge_payment [store, 5 attempts, ordered" in (await t.client.get("/wiring")).text
    assert (await t.client.get("/health/bus")).status_code == 200


def wait_for(client: httpx.Client, **facts: Any) -> dict[str, Any]:
    """Ask for the state until nothing is open and the facts are so; what it is then, or after a minute and a half."""
    until = time.monotonic() + 90
    while True:
        now: dict[str, Any] = client.get("/state").json()
        if (not now["ledger"]["working"] and facts.items() <= now.items()) or time.monotonic() > until:
            return now
        time.sleep(0.1)


@pytest.mark.timeout(300)
def test_served(served: Served) -> None:
    """Served, the shop says where it is and who handles what, sells, and ends at once and in peace when told to."""
    assert "event shop.order_placed, key order_id -> store" in served.printed
    with httpx.Client(base_url=served.url, timeout=30) as client, client.stream("GET", "/events"):
        for _ in range(10):
            assert client.post("/orders", json=ORDER).status_code == 201
        now = wait_for(client, placed=10)
        assert [now[step] for step in STEPS] == [10] * 4
        assert now["ledger"] == CLEAN
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
    assert served.process.communicate() == ("", "")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lease", [TAKEN_OVER])
def test_killed_in_the_middle(served: Served, data: Path) -> None:
    """Killed with -9 in the middle of a hundred orders, twice, the shop goes on, loses nothing and doubles nothing."""
    ids = [str(uuid4()) for _ in range(100)]
    processes: list[int] = []

    def place(order_id: str) -> None:
        for _ in range(300):
            try:
                if client.post("/orders", json=ORDER | {"order_id": order_id}).status_code == 201:
                    return
            except httpx.TransportError:
                pass  # it was killed: ask again
            time.sleep(0.1)
        raise AssertionError("no answer")

    def kill() -> None:
        processes.append(client.post("/kill").json())

    with httpx.Client(base_url=served.url, timeout=30) as client:
        with ThreadPoolExecutor(4) as pool:
            for number, order in enumerate([pool.submit(place, id) for id in ids]):
                order.result()
                if number in (30, 60):
                    kill()
        now = wait_for(client, placed=100)
    assert [now[step] for step in STEPS] == [100] * 4
    ledger = now["ledger"]
    assert (ledger["working"], ledger["lost"], ledger["doubled"]) == (False, 0, 0)
    assert ledger["redelivered"] > 0
    assert 0 <= ledger["repeated"] <= 2 * 8
    assert len({now["process"], *processes}) == 3
    served.process.send_signal(signal.SIGTERM)
    printed, errors = served.process.communicate(timeout=30)
    assert (served.process.returncode, errors) == (0, "")
    assert printed.count("was killed with -9") == 2
    database = sqlite3.connect(data / "shop.db")
    assert {id for (id,) in database.execute("SELECT order_id FROM orders")} == set(ids)
    database.close()


@pytest.mark.timeout(300)
def test_data_stays_where_it_was_told_to(data: Path) -> None:
    """With --data the orders are there again the next time; without it nothing is left behind."""
    for placed in (1, 2):
        shop = serve("--port", "0", "--data", str(data))
        with httpx.Client(base_url=shop.url, timeout=30) as client:
            assert client.post("/orders", json=ORDER).status_code == 201
            assert wait_for(client, placed=placed)["emailed"] == placed
        shop.process.send_signal(signal.SIGTERM)
        assert shop.process.wait(30) == 0
        shop.process.communicate()


def test_next_port_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is taken is left to whoever has it: the shop opens at a later one, and leaves no file behind."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        shop = serve("--port", str(port))
        assert len(list(tmp_path.glob("*/shop.db"))) == 1
        shop.process.send_signal(signal.SIGINT)
        assert shop.process.wait(30) == 0
        shop.process.communicate()
    assert int(shop.url.rpartition(":")[2]) > port
    assert list(tmp_path.iterdir()) == []
