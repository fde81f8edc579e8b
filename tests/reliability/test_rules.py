"""The rules of docs/reliability.md that no other test keeps."""

import ast
import marshal
import pickle
import re
import sqlite3
import sys
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from eventbus import Event, EventBus, Module, Retry
from eventbus.fastapi import install
from eventbus.stores.sqlite import SQLiteStore
from eventbus.testing import Harness, harness
from eventbus.testing.record import Record
from eventbus.transport import Wire, connect
from eventbus.transports._kafka_cluster import topic_name
from eventbus.transports._nats_address import subject_of

ROOT = Path(__file__).parents[2]
SECRET = "c4n4ry"


class Paid(Event, name="rules.paid"):
    number: int


class Marker:
    """Leave a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def headers(**facts: str) -> dict[str, str]:
    named = {"ce-specversion": "1.0", "ce-id": "x", "ce-type": "rules.paid", "ce-source": "elsewhere"}
    return {**named, "ce-time": "2026-01-01T00:00:00Z", "content-type": "application/json", **facts}


async def put(t: Harness, body: bytes, **facts: str) -> None:
    """Put a message on the queue, past the bus."""
    await t.bus.engine.links["memory"].transport.publish("rules.paid", [Wire("x", body, headers(**facts))])


def shop(error: str | None = None, store: SQLiteStore | None = None) -> EventBus:
    module = Module("shop", messages=[Paid])

    @module.on(Paid, retry=Retry(1))
    async def book(event: Paid) -> None:
        private = SECRET
        if error is not None:
            raise ValueError(error.format(len(private)))

    return EventBus(module, name="shop", store=store, routes={Paid: "memory" if store is None else "store"})


@pytest.mark.parametrize("kind", ["application/x-python-serialize", "application/x-pickle", "application/json", ""])
async def test_s1_nothing_is_unpickled(tmp_path: Path, kind: str) -> None:
    """A pickle dies unread, whatever its content type says. Refuses: inducer/relate#1504, arq's default (S1)."""
    marker = tmp_path / "unpickled"
    async with harness(shop()) as t:
        for body in (pickle.dumps(Marker(marker)), marshal.dumps(compile("1", "", "eval"))):
            await put(t, body, **{"content-type": kind})
        await t.settled()
        assert len(t.dead) == 2
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "../../x", "this", "xml.dom.minidom"])
async def test_s2_no_name_is_imported_from_the_wire(name: str) -> None:
    """A type that is a path into Python is an unknown name like others: it waits, and nothing is imported (S2)."""
    async with harness(shop()) as t:
        loaded = set(sys.modules)
        await put(t, b'{"number": 1}', **{"ce-type": name})
        await t.settled()
        assert set(sys.modules) - loaded == set()
        assert t.handled("shop.book") == []
        await t.advance(200_000)
        (dead,) = t.dead
        assert name in (dead.error or "")


def rows(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT * FROM eventbus_entry ORDER BY seq").fetchall()


async def test_s4_no_route_of_ours_changes_anything(tmp_path: Path) -> None:
    """What install() adds is read by GET alone, wherever it is asked from, and reading changes no row (S4)."""
    app, bus = FastAPI(), shop(store=SQLiteStore(tmp_path / "s.db"))
    theirs = [*app.routes]
    install(app, bus, health="/health/bus")
    methods = {method for route in app.routes if route not in theirs for method in getattr(route, "methods", ())}
    assert methods <= {"GET", "HEAD"}
    async with harness(bus, app=app) as t:
        await t.publish(Paid(number=1))
        await t.settled()
        before = rows(tmp_path / "s.db")
        assert len(before) == 1
        for method, status in {"GET": 200, "POST": 405, "PUT": 405, "PATCH": 405, "DELETE": 405}.items():
            answer = await t.client.request(method, "/health/bus", headers={"origin": "https://evil.example"})
            assert answer.status_code == status
            assert not {"set-cookie", "access-control-allow-origin"} & {*answer.headers}
        assert rows(tmp_path / "s.db") == before


async def test_s15_tenants_with_a_store_each_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One id in two tenants is two effects; what dies in one is not found, replayed or discarded by the other (S15)."""
    monkeypatch.setattr(Record, "new_id", lambda _: "one-and-the-same")
    async with (
        harness(shop("no", store=SQLiteStore(tmp_path / "a.db"))) as a,
        harness(shop("no", store=SQLiteStore(tmp_path / "b.db"))) as b,
        harness(shop(store=SQLiteStore(tmp_path / "c.db"))) as c,
    ):
        for t in (a, b, c):
            await t.publish(Paid(number=1))
            await t.settled()
        assert [len(t.dead) for t in (a, b, c)] == [1, 1, 0]
        assert [len(t.handled("shop.book")) for t in (a, b, c)] == [0, 0, 1]
        assert await c.bus.dead.replay(message=Paid) == 0
        assert await a.bus.dead.discard(a.dead[0].id) == 1
        assert [len(await t.bus.dead.find()) for t in (a, b)] == [0, 1]
    ids = [row[1] for name in "abc" for row in rows(tmp_path / f"{name}.db")]
    assert ids == ["one-and-the-same"] * 3


async def test_s8_an_error_keeps_no_locals() -> None:
    """The reason of a death has the words of the error, and nothing of what the handler had in its hands (S8)."""
    async with harness(shop("no more than {} letters")) as t:
        await t.publish(Paid(number=1))
        await t.settled()
        (dead,) = t.dead
        assert "no more than 6 letters" in dead.error
        assert SECRET not in repr(dead)


async def test_s11_no_address_is_taken_from_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address for replies in a message is data: nobody connects to it (S11)."""
    asked = list[object]()
    async with harness(shop()) as t:
        monkeypatch.setattr("socket.socket.connect", lambda *given: asked.append(given))
        monkeypatch.setattr("socket.getaddrinfo", lambda *given, **_: asked.append(given))
        reply = "http://169.254.169.254/latest/meta-data"
        await put(t, b'{"number": 1}', **{"ce-replyto": reply, "ce-dataschema": reply, "reply-to": reply})
        await t.settled()
        assert [Paid(number=1)] == t.handled("shop.book")
    assert asked == []


async def test_s13_nothing_is_decompressed() -> None:
    """A compressed body is no JSON and dies as it is: no bomb can be sent (S13, F37)."""
    async with harness(shop()) as t:
        await put(t, zlib.compress(b'{"number": ' + b" " * 10_000_000 + b"1}"), **{"content-encoding": "deflate"})
        await t.settled()
        (dead,) = t.dead
        assert len(dead.body) < 50_000


@pytest.mark.parametrize("topic", ["#", "*", "a.#", "*.a", ">", "a.>", "a*", "$SYS.x", "a b"])
async def test_s14_no_topic_is_a_pattern(topic: str) -> None:
    """What a broker would read as a pattern is refused or becomes a plain name (S14)."""
    if {"*", "#"} & {*topic.split(".")}:
        with pytest.raises(ValueError, match="is a pattern"):
            await connect("amqp://localhost").publish(topic, [])
    assert not {*subject_of(topic)} & {*"*> $"}
    assert not {*topic_name(topic)} & {*"*>#$ "}


async def test_s17_a_database_loads_no_extension(tmp_path: Path, anyio_backend: str) -> None:
    """The session of the embedded store runs no code out of a library (S17)."""
    bus = EventBus(Module("m"), name="shop", store=SQLiteStore(tmp_path / "s.db"))
    async with bus.running(), bus.transaction() as tx:
        with pytest.raises((sqlite3.Error, ValueError), match=r"not authorized|no such function|load_extension"):
            await tx.session.execute("SELECT load_extension('libm')")


def test_s18_nothing_is_written_for_a_spreadsheet() -> None:
    """There is no CSV, no sheet and no download, in which a message could hide a formula (S18)."""
    sheets = re.compile(r"(?i)(import|from) csv\b|openpyxl|xlsxwriter|text/csv|\.csv\b|content-disposition|--csv")
    found = [path.name for path in sorted((ROOT / "eventbus").rglob("*.py")) if sheets.search(path.read_text())]
    assert found == []


def test_s19_floors_of_dependencies() -> None:
    """Two are required, and no version with a known hole is allowed. Refuses: CVE-2023-28858 in redis < 4.5.3 (S19)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(one.partition(">")[0] for one in project["dependencies"]) == ["anyio", "pydantic"]
    redis = next(one for one in project["optional-dependencies"]["redis"] if one.startswith("redis"))
    assert int(redis.partition(">=")[2].partition(".")[0]) >= 5
    assert "orjson" not in str(project)


def variables() -> Iterator[str]:
    """Yield each name of an environment variable that the package reads; anything but a constant as its source."""
    for path in sorted((ROOT / "eventbus").rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text if "env" in text else "")
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
                use = parents[node]
                while not isinstance(use, (ast.Call, ast.Compare, ast.stmt, ast.IfExp)):
                    use = parents[use]
                yield ast.unparse(use)


def test_s20_no_switch_in_the_environment() -> None:
    """No variable opens a fault point or a debugging door: these three places read the environment (S20)."""
    assert sorted(set(variables())) == [
        "'NO_COLOR' not in os.environ",
        "os.environ if environment is None else environment",
        "os.environ.get('EVENTBUS_CONFIG')",
    ]
