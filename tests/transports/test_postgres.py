"""PostgreSQL's NOTIFY passes the exam on a real server, carries live streams, and says what it cannot carry."""

import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager

import anyio
import psycopg
import pytest

from eventbus import Event, EventBus, Gap, Limits, Module, WiringError
from eventbus.errors import Lost, PublishError, Refused
from eventbus.testing.transport_exam import Bench, Check, broker_checks_for, checks_for, examine
from eventbus.transport import Subscription, Wire, connect
from eventbus.transports._postgres_ear import short, unframe
from eventbus.transports.postgres import MAX_BYTES, PostgreSQLNotifyTransport
from tests.servers.databases import execute
from tests.servers.proxy import Proxy
from tests.servers.server import Server
from tests.transports.brokers import broker_at

NOTIFIES = PostgreSQLNotifyTransport.from_url("postgresql+notify://localhost").capabilities
SECRET = "hunter2"


class Moved(Event, name="n.moved"):
    """State that something moved."""

    number: int
    note: str = ""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client is opened on no other."""
    return "asyncio"


@pytest.fixture
def url(postgres: Server) -> str:
    postgres.start()
    return postgres.url.replace("+psycopg", "+notify")


@pytest.mark.parametrize("check", checks_for(NOTIFIES), ids=str)
async def test_exam(url: str, check: Check) -> None:
    await examine(Bench(make=lambda: connect(url), quiet=0.25), check)


@pytest.mark.parametrize("check", broker_checks_for(NOTIFIES), ids=str)
async def test_exam_of_the_broker(url: str, check: Check, postgres: Server) -> None:
    """Whatever happens to the server and the network, who waits is told, and nothing is left there."""

    async def keep(topic: str, group: str) -> None:
        """Delete nothing: nothing is there."""

    async def left(topic: str) -> list[str]:
        async with await psycopg.AsyncConnection.connect(postgres.url.replace("+psycopg", "")) as asking:
            clients = "SELECT pid FROM pg_stat_activity WHERE client_port > 0 AND pid <> pg_backend_pid()"
            return [str(pid) for (pid,) in await (await asking.execute(clients)).fetchall()]

    broker = broker_at(
        postgres, "postgresql+notify://postgres@127.0.0.1:{port}/postgres", proxy=lambda: Proxy(postgres.port),
        delete=keep, delete_dead=keep, left=left,
    )  # fmt: skip
    try:
        await examine(Bench(make=lambda: connect(url), quiet=0.25, broker=broker), check)
    finally:
        postgres.start()


def process(url: str, store: str | None = None) -> EventBus:
    """Return the bus of one process."""
    module = Module("m", messages=[Moved])
    return EventBus(module, name="n", store=store, transports={"push": url}, live="push")


async def test_a_stream_hears_another_process_after_its_commit(postgres_url: str) -> None:
    """What one bus commits the other's stream gets, once and in order; what is rolled back, never."""
    url = postgres_url.replace("+psycopg", "+notify")
    here, there = process(url, f"{postgres_url}?create=true"), process(url)
    async with here.running(), there.running(), here.stream(Moved) as near, there.stream(Moved) as far:
        with pytest.raises(KeyError):
            async with here.transaction():
                await here.publish(Moved(number=0))
                raise KeyError
        async with here.transaction():
            for number in (1, 2, 3):
                await here.publish(Moved(number=number, note="caf\xe9 \u2615"))
            with anyio.move_on_after(0.3):
                pytest.fail(f"heard {await anext(far)} before the commit")
        expected = [Moved(number=number, note="caf\xe9 \u2615") for number in (1, 2, 3)]
        with anyio.fail_after(10):
            assert [await anext(far) for _ in expected] == expected
            await there.publish(Moved(number=4))
            assert [await anext(near) for _ in range(4)] == [*expected, Moved(number=4)]
            assert await anext(far) == Moved(number=4)


async def test_what_is_too_large_is_a_gap(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """An event beyond what NOTIFY takes stays at home: the log says so, and readers hear that one is missing."""
    here, there = process(url), process(url)
    async with here.running(), there.running(), there.stream(Moved) as far:
        for event in (Moved(number=1), Moved(number=2, note="x" * 8_000), Moved(number=3)):
            await here.publish(event)
        with anyio.fail_after(10):
            assert [await anext(far) for _ in range(3)] == [Moved(number=1), Gap(missed=1), Moved(number=3)]
    assert "more than NOTIFY carries" in caplog.text


async def test_a_lost_connection_heals(url: str, postgres: Server) -> None:
    """When the server ends both connections readers get Gap(0), and what is published afterwards arrives."""
    here, there = process(url), process(url)
    async with here.running(), there.running(), there.stream(Moved) as far:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE client_port > 0"
        execute(postgres.url, f"{others} AND pid <> pg_backend_pid()")
        with anyio.fail_after(10):
            assert await anext(far) == Gap(missed=0)
            seen: list[object] = []
            while Moved(number=1) not in seen:  # the publisher's link notices when it publishes
                await here.publish(Moved(number=1))
                with anyio.move_on_after(0.2):
                    seen.append(await anext(far))


async def test_a_listener_that_falls_behind_is_told(url: str) -> None:
    async with connect(url, Limits(queue=3)) as transport:
        with pytest.raises(Refused, match="no groups"):
            await transport.subscribe("t", group="g", prefetch=1, lease=1).__aenter__()
        async with transport.subscribe("t", group=None, prefetch=1, lease=1) as slow:
            await transport.publish("t", [Wire(str(number), b"{}") for number in range(4)])
            async with transport.subscribe("t", group=None, prefetch=1, lease=1) as quick:
                await transport.publish("t", [Wire("5", b"{}")])
                assert (await quick.receive()).wire.id == "5"
            with pytest.raises(Lost, match="more than 3 messages behind"):
                await slow.receive()


async def test_who_leaves_deafens_nobody(url: str) -> None:
    """A subscriber that is cut before it is heard of, or leaves, takes the channel from nobody and stays nowhere."""
    transport = PostgreSQLNotifyTransport.from_url(url)

    def listening(topic: str) -> AbstractAsyncContextManager[Subscription]:
        return transport.subscribe(topic, group=None, prefetch=1, lease=1)

    async with transport:
        async with listening("t") as one:
            for seconds in (0, 0.01, 0.05, 0.15, 0.3):
                with anyio.move_on_after(seconds):
                    async with listening("t"):
                        await anyio.sleep_forever()
            async with listening("turned to when all that is done"):
                await transport.publish("t", [Wire("1", b"{}")])
            with anyio.fail_after(5):
                assert (await one.receive()).wire.id == "1"
        async with listening("once more"):
            assert [*transport._ears] == [short("once more")]


async def test_a_lost_publisher_ends_the_listeners_too(url: str, postgres: Server) -> None:
    """When only the publishing connection is lost, the next publish says so, and so does everything else."""
    transport = PostgreSQLNotifyTransport.from_url(url)
    async with transport, transport.subscribe("t", group=None, prefetch=1, lease=1) as one:
        execute(postgres.url, f"SELECT pg_terminate_backend({transport._connections[0].info.backend_pid})")
        with pytest.raises(PublishError) as caught:
            while True:
                await transport.publish("t", [Wire("1", b"{}")])
        assert [type(error) for error in caught.value.failed.values()] == [Lost]
        with pytest.raises(Lost), anyio.fail_after(5):
            while True:
                await one.receive()
        with pytest.raises(Lost):
            await transport.declare("t", [])


async def test_only_what_is_too_large_is_refused(url: str) -> None:
    """The error names size, ceiling and cure, also where a long id makes it too large; the others arrive."""
    large, long = Wire("1", b"x" * (MAX_BYTES + 1)), Wire("i" * 400, b"x" * MAX_BYTES)
    async with connect(url) as transport, transport.subscribe("t", group=None, prefetch=1, lease=1) as one:
        with pytest.raises(PublishError) as caught:
            await transport.publish("t", [large, long, Wire("3", b"{}")])
        assert {index: type(error) for index, error in caught.value.failed.items()} == {0: Refused, 1: Refused}
        assert all(word in str(caught.value) for word in ("7701", "7999", "redis+pubsub://"))
        assert (await one.receive()).wire.id == "3"


async def test_a_payload_of_another_program_goes_on(url: str, postgres: Server) -> None:
    """What another program notifies is handed on as it is, to be judged where wires are decoded."""
    async with connect(url) as transport, transport.subscribe('a "b"', group=None, prefetch=1, lease=1) as one:
        execute(postgres.url, "SELECT pg_notify('a \"b\"', 'hello')")
        assert (await one.receive()).wire == Wire("", b"hello")
    for odd in ("[1]\n{}", '["1", null, "base64"]\nx', "{\n}", "[" * 5_000 + "\n", ""):
        assert unframe(odd) == Wire("", odd.encode())


@pytest.fixture
def locked(postgres: Server) -> Iterator[None]:
    """Have the server ask the user ``locked`` for a password, where it trusts everybody else."""
    if postgres.place is None:
        pytest.skip("the postgres server is not ours to lock")
    rules = postgres.place.directory / "data/pg_hba.conf"
    before = rules.read_text()
    execute(postgres.url, "CREATE ROLE locked LOGIN PASSWORD 'right'")
    rules.write_text(f"host all locked 127.0.0.1/32 scram-sha-256\n{before}")
    execute(postgres.url, "SELECT pg_reload_conf()")
    yield
    rules.write_text(before)
    execute(postgres.url, "SELECT pg_reload_conf()", "DROP ROLE locked")


async def test_a_wrong_password_is_refused_and_not_shown(
    url: str, locked: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has the wrong password is told what to look at, and the password stands nowhere; the right one lets in."""
    caplog.set_level("DEBUG")
    with anyio.fail_after(10), pytest.raises(Refused, match=r"in: .*; correct the user name, the password") as caught:
        while True:  # the server reads its rules anew when it finds the time
            async with connect(url.replace("postgres@", f"locked:{SECRET}@")):
                pass
    assert SECRET not in f"{caught.value!r}{caught.value.__cause__!r}{caplog.text}"
    async with connect(url.replace("postgres@", "locked:right@")) as transport:
        await transport.declare("t", [])


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_another_event_loop_is_refused(anyio_backend: str) -> None:
    with pytest.raises(Exception, match="asyncio only"):
        await connect("postgresql+notify://localhost").__aenter__()


async def test_nobody_there_and_nobody_let_in(url: str) -> None:
    """A server that is away is Lost, a user or database that is not known Refused; neither shows the password."""
    for wrong, kind in (
        (f"postgresql+notify://u:{SECRET}@127.0.0.1:1/d", Lost),
        (url.replace("postgres@", f"nobody:{SECRET}@"), Refused),
        (url.replace("/postgres", "/nowhere"), Refused),
    ):
        with pytest.raises(kind) as caught:
            await connect(wrong).__aenter__()
        assert SECRET not in str(caught.value)


def test_a_handler_cannot_depend_on_it(url: str) -> None:
    """A route that would make a handler depend on NOTIFY is a fault of the wiring, with a store or without."""
    for store in (None, "memory://"):
        module = Module("m")
        module.on(Moved, name="book")(lambda event: None)
        bus = EventBus(module, name="n", store=store, transports={"push": url}, routes={Moved: "push"})
        with pytest.raises(WiringError, match="has no consumer groups"):
            bus.compile()


@pytest.mark.parametrize("tail", ["?colour=red", "?sslmode=a&sslmode=b", "#part", ":port/d", "/d@e", ":0"])
def test_a_url_with_anything_unknown_is_refused(tail: str) -> None:
    with pytest.raises(ValueError, match=r"postgresql\+notify://") as caught:
        connect(f"postgresql+notify://user:{SECRET}@localhost{tail}")
    assert SECRET not in str(caught.value)


def test_a_missing_client_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ImportError, match=r"pip install 'eventbus\[postgres\]'"):
        connect("postgresql+notify://localhost")


def test_channels_differ_where_topics_differ() -> None:
    topics = ["a.b", "a_b", "A.b", "x" * 63, "x" * 64, "x" * 65, "\N{SNOWMAN}" * 30, "\N{SNOWMAN}" * 31]
    assert len({short(topic) for topic in topics}) == len(topics)
    assert all(len(short(topic).encode()) <= 63 for topic in topics)
