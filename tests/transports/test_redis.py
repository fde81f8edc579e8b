"""The Redis transports pass the exam on a real server, and do what only they can."""

import asyncio
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest
from redis.asyncio import Redis

from eventbus.errors import Lost, MissingExtraError, PublishError, Refused, SettleError, TransportError
from eventbus.limits import Limits
from eventbus.testing.transport_exam import Bench, Broker, Check, broker_checks_for, checks_for, examine
from eventbus.transport import Delivery, Subscription, Transport, Wire, connect
from eventbus.transports import _redis_group, _redis_link
from eventbus.transports.redis import RedisPubSubTransport, RedisTransport
from tests.servers.proxy import Fault, Proxy
from tests.servers.server import Server
from tests.transports.brokers import broker_at

STREAMS = RedisTransport("redis://localhost").capabilities
CHANNELS = RedisPubSubTransport("redis+pubsub://localhost").capabilities
NUMBERS = iter(range(1_000_000))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client knows nothing else."""
    return "asyncio"


@pytest.fixture
def topic() -> str:
    """Return a topic that nobody else uses."""
    return f"t{next(NUMBERS)}"


@pytest.fixture
async def client(valkey: Server) -> AsyncGenerator[Redis]:
    """Return a client of our own, to look at the server and to disturb it."""
    async with Redis.from_url(valkey.url) as client:
        yield client


@contextmanager
def faulty(transport: Transport) -> Iterator[None]:
    """Have the server refuse what has the body of a fault."""
    ask = _redis_link.Session.ask

    async def full(session: Any, commands: Sequence[Any], *limits: float) -> list[Any]:
        replies = await ask(session, [("PING",) if one[-1] == b"fault" else one for one in commands], *limits)
        outcome = zip(commands, replies, strict=True)
        return [RuntimeError("OOM") if command[-1] == b"fault" else reply for command, reply in outcome]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_redis_link.Session, "ask", full)
        yield


def broker_of(valkey: Server, scheme: str, messages: int) -> Broker:
    """Return what the exam can do to a server that it reaches by a scheme."""

    async def delete(topic: str, group: str) -> None:
        async with Redis.from_url(valkey.url) as client:
            await client.delete(topic)

    async def delete_dead(topic: str, group: str) -> None:
        async with Redis.from_url(valkey.url) as client:
            await client.set(f"{topic}@{group}.dead", "in the way")

    async def left(topic: str) -> list[str]:
        async with Redis.from_url(valkey.url) as client:
            groups = await client.xinfo_groups(topic) if await client.exists(topic) else []
            channels = await client.pubsub_numsub(topic)
            return [*map(repr, groups), *(f"{topic} {number}" for _, count in channels for number in range(count))]

    return broker_at(
        valkey, scheme + "://127.0.0.1:{port}/0", proxy=lambda: Proxy(valkey.port), delete=delete,
        delete_dead=delete_dead, left=left, count=messages,
    )  # fmt: skip


@pytest.fixture
def bench(valkey: Server, messages: int) -> Bench:
    """Return a bench on the real server."""

    async def buried(transport: Transport, topic: str, group: str) -> Sequence[tuple[str, str]]:
        async with Redis.from_url(valkey.url) as client:
            entries = await client.xrange(f"{topic}@{group}.dead")
        return [(fields[b"id"].decode(), fields[b"reason"].decode()) for _, fields in entries]

    broker = broker_of(valkey, "redis", messages)
    return Bench(
        make=lambda: RedisTransport(valkey.url), lease=0.6, quiet=0.3, dead=buried, faulty=faulty, broker=broker
    )


@pytest.mark.parametrize("check", checks_for(STREAMS), ids=str)
async def test_exam_of_streams(check: Check, bench: Bench) -> None:
    """Streams pass the exam."""
    await examine(bench, check)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("check", broker_checks_for(STREAMS), ids=str)
async def test_exam_of_the_broker(bench: Bench, check: Check, valkey: Server) -> None:
    """Whatever happens to the broker, what is declared is kept."""
    try:
        await examine(replace(bench, lease=3.0), check)  # what is postponed waits no longer than that
    finally:
        valkey.start()


@pytest.mark.parametrize("check", checks_for(CHANNELS), ids=str)
async def test_exam_of_channels(check: Check, valkey: Server) -> None:
    """Pub/Sub passes what it promises."""
    url = valkey.url.replace("redis", "redis+pubsub", 1)
    await examine(Bench(make=lambda: RedisPubSubTransport(url), quiet=0.2), check)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("check", broker_checks_for(CHANNELS), ids=str)
async def test_exam_of_the_broker_of_channels(check: Check, valkey: Server, messages: int) -> None:
    """Whatever happens to the server, channels keep what they promise."""
    url, broker = valkey.url.replace("redis", "redis+pubsub", 1), broker_of(valkey, "redis+pubsub", messages)
    try:
        await examine(Bench(make=lambda: connect(url), quiet=0.2, broker=broker), check)
    finally:
        valkey.start()


def wires(*ids: str, key: str | None = None) -> list[Wire]:
    return [Wire(id, b"{}", key=key) for id in ids]


def group(
    transport: RedisTransport, topic: str, name: str = "g", *, prefetch: int = 10, lease: float = 30.0,
    ordered: bool = False,
) -> AbstractAsyncContextManager[Subscription]:  # fmt: skip
    return transport.subscribe(topic, group=name, prefetch=prefetch, lease=lease, ordered=ordered)


async def take(subscription: Subscription, count: int = 1) -> list[Delivery]:
    with anyio.fail_after(20):
        return [await subscription.receive() for _ in range(count)]


async def quiet(subscription: Subscription) -> None:
    with anyio.move_on_after(0.45):
        delivery = await subscription.receive()
        raise AssertionError(f"{delivery.wire.id} arrived")


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.wire.id for delivery in deliveries]


async def until(fact: Callable[[], Awaitable[object]]) -> None:
    with anyio.fail_after(10):
        while not await fact():  # noqa: ASYNC110 - the server cannot tell
            await anyio.sleep(0.02)


async def calls(client: Redis, command: str) -> int:
    stats: dict[str, Any] = await client.info("commandstats")
    return stats.get(f"cmdstat_{command}", {"calls": 0})["calls"]


# opening


@pytest.mark.parametrize(
    "tail",
    ["?colour=red", "?timeout=1&timeout=2", "?timeout=0", "?timeout=x", "?prefix", "/x", "#x", ":port/", "?trim=maybe"],
)
def test_a_url_with_anything_unknown_is_refused(tail: str) -> None:
    """What is not understood is named with all that is, and the URL's secret is not repeated."""
    with pytest.raises(ValueError, match=r"timeout, cafile, certfile, keyfile, prefix, trim|yes or no") as caught:
        connect(f"redis://user:hunter2@localhost{tail}")
    assert "hunter2" not in f"{caught.value!r}{caught.value.__cause__!r}"


@pytest.mark.parametrize("secret", ["hun/ter2", "hun?ter2", "hun#ter2"])
def test_a_secret_that_is_not_encoded_is_not_repeated(secret: str) -> None:
    """A password that breaks its URL is an error that does not show it."""
    with pytest.raises(ValueError, match="percent-encoded") as caught:
        connect(f"rediss+pubsub://me:{secret}@h:1/2")
    assert "ter2" not in f"{caught.value!r}"


def test_a_secret_is_in_no_text() -> None:
    """A transport shows where it connects to, and never how it gets in."""
    transport = connect("rediss+pubsub://me:hunter2@h:1/2")
    assert repr(transport) == "RedisPubSubTransport('rediss://h:1/2')"
    assert "hunter2" not in repr(vars(transport))


def test_a_url_says_where_and_how() -> None:
    """Host, port, database, user, password and options are read, with their defaults."""
    address = RedisTransport("redis://").address
    assert (str(address), address.username, address.password) == ("redis://localhost:6379/0", None, None)
    address = RedisTransport("rediss://me:p%40ss%2Fw@[::1]:7/3?timeout=1.5&cafile=/ca.pem").address
    assert str(address) == "rediss://[::1]:7/3"
    found = (address.username, address.password, address.timeout, address.cafile)
    assert found == ("me", "p@ss/w", 1.5, "/ca.pem")
    assert connect("redis://h", Limits(lease=7.0)).capabilities.retry == 7.0
    assert isinstance(connect("rediss://h"), RedisTransport)
    assert isinstance(connect("redis+pubsub://h"), RedisPubSubTransport)


@pytest.mark.parametrize("library", ["redis.asyncio", "hiredis"])
def test_a_missing_library_says_what_installs_it(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the client the error is the line that installs it."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'eventbus\[redis\]'"):
        connect("redis://localhost")


def test_another_event_loop_is_refused() -> None:
    """Opening under trio is a clear error."""

    async def main() -> None:
        with pytest.raises(TransportError, match="runs on asyncio only"):
            await RedisTransport("redis://localhost").__aenter__()

    anyio.run(main, backend="trio")


async def test_wrong_credentials_are_a_clear_error(valkey: Server, client: Redis) -> None:
    """A wrong password, none, and a right one that must be encoded: an error without the password, or an open link."""
    await client.execute_command("ACL", "SETUSER", "bob", "reset", "on", ">p@ss/w:rd", "~*", "&*", "+@all")
    url = valkey.url.replace("redis://", "redis://bob:{}@")
    async with RedisTransport(url.format("p%40ss%2Fw%3Ard")) as transport:
        await transport.declare("t", ["g"])
    with pytest.raises(Refused, match="does not let us in: invalid username-password pair") as caught:
        await RedisTransport(url.format("hunter2")).__aenter__()
    assert "hunter2" not in f"{caught.value!r}{caught.value.__cause__!r}"
    await client.config_set("requirepass", "x")
    try:
        with pytest.raises(Refused, match="Authentication required"):
            await RedisTransport(valkey.url).__aenter__()
    finally:
        await client.config_set("requirepass", "")
    with pytest.raises(Refused, match=r"does not let us in: .*index"):
        await RedisTransport(valkey.url.removesuffix("0") + "99").__aenter__()
    await client.execute_command("ACL", "SETUSER", "ann", "reset", "on", ">x", "~*", "+@all", "-ping")
    with pytest.raises(Refused, match=r"does not let us in: .*permission"):
        await RedisTransport(valkey.url.replace("redis://", "redis://ann:x@")).__aenter__()


async def test_who_lacks_a_right_is_told(valkey: Server, client: Redis, topic: str) -> None:
    """A user who may not make groups gets an error that is no loss; one who may not trim can still consume."""
    await client.execute_command(
        "ACL", "SETUSER", "eve", "reset", "on", ">x", "~*", "+@all", "-xgroup|create", "-xinfo"
    )
    async with RedisTransport(valkey.url.replace("redis://", "redis://eve:x@")) as transport:
        with pytest.raises(TransportError, match="declaring group 'g'") as caught:
            await transport.declare(topic, ["g"])
        assert not isinstance(caught.value, Lost)


async def test_the_rights_that_the_guide_names_are_enough(valkey: Server, client: Redis, topic: str) -> None:
    """A user with no more than these can do all there is to do."""
    await client.execute_command(
        "ACL", "SETUSER", "sue", "reset", "on", ">x", f"~{topic}*", "+@stream", "+eval", "+ping", "+select", "+get",
        "+set", "+del", "+pexpire",
    )  # fmt: skip
    await client.execute_command(
        "ACL", "SETUSER", "pat", "reset", "on", ">x", f"&{topic}*", "+publish", "+subscribe", "+ping", "+select"
    )
    async with RedisTransport(valkey.url.replace("redis://", "redis://sue:x@")) as transport:
        await transport.publish(topic, wires("1", "2", "3"))
        for ordered in (False, True):
            async with group(transport, topic, str(ordered), ordered=ordered) as subscription:
                held = await take(subscription, 3)
                await held[0].ack()
                await held[1].extend()
                await held[1].retry(0)
                await held[2].reject("bad")
                assert ids(await take(subscription)) == ["2"]
    async with (
        RedisPubSubTransport(valkey.url.replace("redis://", "redis+pubsub://pat:x@")) as channels,
        channels.subscribe(topic, group=None, prefetch=1, lease=1.0) as listener,
    ):
        await channels.publish(topic, wires("1"))
        assert ids(await take(listener)) == ["1"]


async def test_a_server_that_is_away_is_lost(topic: str) -> None:
    """Nobody at the port is Lost, at once; so is everything on a transport that is not open."""
    transport = RedisTransport("redis://127.0.0.1:9/0")
    with pytest.raises(Lost, match="cannot be reached"):
        await transport.__aenter__()
    with pytest.raises(PublishError) as caught:
        await transport.publish(topic, wires("1"))
    assert {index: type(error) for index, error in caught.value.failed.items()} == {0: Lost}
    with pytest.raises(Lost, match="not open"):
        async with group(transport, topic):
            pass


async def test_opening_twice_is_an_error(valkey: Server) -> None:
    """A transport that is open is not opened again, and closing it twice does nothing."""
    async with RedisTransport(valkey.url) as transport:
        with pytest.raises(TransportError, match="open already"):
            await transport.__aenter__()
    await transport.__aexit__(None, None, None)


async def test_tls(valkey: Server, topic: str, tmp_path: Path, absent: Callable[[str], NoReturn]) -> None:
    """A certificate that nobody vouches for is refused; with its authority in the URL all goes through TLS."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(["openssl", *request, *names], check=True, capture_output=True)  # noqa: ASYNC221 - it is quick
    except FileNotFoundError:
        absent("no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            sink.write(data)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", valkey.port)
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        url = f"rediss://localhost:{server.sockets[0].getsockname()[1]}/0"
        with pytest.raises(Lost, match=r"(?i)certificate"):
            await RedisTransport(url).__aenter__()
        async with RedisTransport(f"{url}?cafile={certificate}") as transport, group(transport, topic) as subscription:
            await transport.publish(topic, wires("1"))
            assert ids(await take(subscription)) == ["1"]


# publishing


async def test_a_lost_answer_is_lost_and_nothing_is_sent_again(valkey: Server, client: Redis, topic: str) -> None:
    """When the link breaks behind a publish it is reported, and the client does not publish a second time."""
    async with Proxy(valkey.port).running() as proxy, RedisTransport(f"redis://127.0.0.1:{proxy.port}") as transport:
        proxy.inject(Fault(does="reset", at=b"XADD", passed=True, times=1))
        with pytest.raises(PublishError, match="is lost"):
            await transport.publish(topic, wires("1"))
        with pytest.raises(PublishError, match="is lost"):
            await transport.publish(topic, wires("2"))
        with pytest.raises(Lost):
            await transport.declare(topic, ["g"])
    assert [fields[b"id"] for _, fields in await client.xrange(topic)] == [b"1"]


async def test_what_a_turn_publishes_and_settles_goes_out_together(valkey: Server, client: Redis, topic: str) -> None:
    """500 concurrent publishes are a few writes, and 200 concurrent acks a few commands."""
    async with RedisTransport(valkey.url) as transport, group(transport, topic, prefetch=200) as subscription:
        before = transport.writes
        async with anyio.create_task_group() as tasks:
            for number in range(500):
                tasks.start_soon(transport.publish, topic, wires(str(number)))
        assert transport.writes - before <= 3
        held = await take(subscription, 200)
        before = await calls(client, "eval")
        async with anyio.create_task_group() as tasks:
            for delivery in held:
                tasks.start_soon(delivery.ack)
        pending = await client.xpending(topic, "g")
        assert await calls(client, "eval") - before <= 3
        assert pending["pending"] <= 200
        assert {entry["consumers"] for entry in await client.xinfo_groups(topic)} == {1}


# consuming


async def test_a_group_or_a_stream_that_is_deleted_is_made_again(valkey: Server, client: Redis, topic: str) -> None:
    """Deleting the group or the whole stream ends the subscription, and the next one heals it."""
    async with RedisTransport(valkey.url) as transport:
        for delete in (lambda: client.xgroup_destroy(topic, "g"), lambda: client.delete(topic)):
            async with group(transport, topic) as subscription:
                await transport.publish(topic, wires("1"))
                [held] = await take(subscription)
                await delete()
                with pytest.raises(Lost, match="group 'g'"):
                    await take(subscription)
                with pytest.raises(SettleError):
                    await held.ack()
            async with group(transport, topic) as subscription:
                await transport.publish(topic, wires("2"))
                arrived: list[str] = []
                while "2" not in arrived:
                    [delivery] = await take(subscription)
                    await delivery.ack()
                    arrived.append(delivery.wire.id)


async def test_a_frozen_link_is_lost(valkey: Server, topic: str) -> None:
    """When the link carries nothing any more, publishers, receivers, and who does neither, learn it by the timeout."""
    async with Proxy(valkey.port).running() as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0?timeout=0.5"
        async with (
            RedisTransport(url) as transport,
            group(transport, topic) as subscription,
            RedisPubSubTransport(url.replace("redis", "redis+pubsub", 1)) as channels,
            channels.subscribe(topic, group=None, prefetch=1, lease=1.0) as listener,
        ):
            await transport.publish(topic, wires("1"))
            [held] = await take(subscription)
            proxy.inject(Fault(does="black-hole"))
            for one in (subscription, listener):
                with pytest.raises(Lost, match=r"did not answer|closed"):
                    await take(one)
            with pytest.raises(PublishError):
                await transport.publish(topic, wires("2"))
            with pytest.raises(SettleError):
                await held.ack()
            with anyio.fail_after(5):
                await until(lambda: _is_lost(channels, topic))


async def test_a_frozen_listener_is_lost_by_itself(valkey: Server, topic: str) -> None:
    """When only its own connection carries nothing any more a listener learns it, though nothing was to come."""
    async with Proxy(valkey.port).running() as proxy:
        channels = RedisPubSubTransport(f"redis+pubsub://127.0.0.1:{proxy.port}/0?timeout=0.5")
        async with channels:
            proxy.inject(Fault(does="black-hole", at=b"subscribe\r\n", by="server", passed=True, times=1))
            with pytest.raises(Lost, match="did not answer"):
                async with channels.subscribe(topic, group=None, prefetch=1, lease=1.0) as listener:
                    await take(listener)
            assert not await _is_lost(channels, topic)
            async with channels.subscribe(topic, group=None, prefetch=1, lease=1.0) as listener:
                await quiet(listener)
                await quiet(listener)
                await quiet(listener)
                await channels.publish(topic, wires("1"))
                assert ids(await take(listener)) == ["1"]


async def _is_lost(transport: Transport, topic: str) -> bool:
    try:
        await transport.declare(topic, [])
    except Lost:
        return True
    return False


async def test_without_its_line_nothing_is_read(valkey: Server, client: Redis, topic: str) -> None:
    """When only the connection breaks on which deliveries are settled, subscriptions end too."""
    async with RedisTransport(f"{valkey.url}?timeout=0.5") as transport:
        async with group(transport, topic) as subscription:
            for one in await client.client_list():
                if one["cmd"] == "xgroup|create":
                    await client.client_kill(one["addr"])
            with pytest.raises(Lost):
                await take(subscription)
        with pytest.raises(Lost):
            await transport.declare(topic, ["g"])


async def test_what_another_program_wrote_arrives(valkey: Server, client: Redis, topic: str) -> None:
    """Entries that are not ours come as they are, to be refused by whoever decodes them; none stops the stream."""
    deep = b"[" * 100_000
    strange = [
        {"a": "b"},
        {"body": b"\xff"},
        {"id": b"\xff", "headers": b"[1]"},
        {"headers": deep},
        {"headers": '{"a":1}'},
    ]
    async with RedisTransport(valkey.url) as transport, group(transport, topic) as subscription:
        for fields in strange:
            await client.xadd(topic, fields)
        await transport.publish(topic, [Wire("5", b"{}", {"a": "1"}, "k")])
        *found, last = [delivery.wire for delivery in await take(subscription, 6)]
        assert [wire.body for wire in found] == [b"", b"\xff", b"", b"", b""]
        assert all(wire.id and not wire.headers and wire.key is None for wire in found)
        assert last == Wire("5", b"{}", {"a": "1"}, "k")


async def test_what_was_deleted_before_it_was_settled_is_told(
    valkey: Server, client: Redis, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody trims what is unsettled: it cannot come back, and the log says so."""
    async with RedisTransport(valkey.url) as transport:
        await transport.publish(topic, wires("1", "2"))
        async with group(transport, topic, lease=0.2) as subscription:
            await take(subscription, 2)
        await client.xtrim(topic, maxlen=1, approximate=False)
        async with group(transport, topic, lease=0.2) as subscription:
            assert ids(await take(subscription)) == ["2"]
            await quiet(subscription)
    assert "1 message(s) were deleted before g had settled them" in caplog.text


async def test_a_listener_that_falls_behind_is_told(valkey: Server, topic: str) -> None:
    """Who listens to a channel and does not read is ended when too much waits for it."""
    transport = RedisPubSubTransport(valkey.url.replace("redis", "redis+pubsub", 1), limits=Limits(queue=3))
    async with transport, transport.subscribe(topic, group=None, prefetch=1, lease=1.0) as listener:
        await transport.publish(topic, wires(*map(str, range(9))))
        await until(lambda: _has_ended(listener))
        with pytest.raises(Lost, match="more than 3 messages behind"):
            await listener.receive()


async def _has_ended(subscription: Any) -> bool:
    return subscription.ended.is_set()


async def test_channels_refuse_what_they_cannot_keep(valkey: Server, topic: str) -> None:
    """A group, and order, are refused with the transport that has them; a foreign message arrives as a body."""
    async with RedisPubSubTransport(valkey.url.replace("redis", "redis+pubsub", 1)) as transport:
        for ask in (
            lambda: transport.declare(topic, ["g"]),
            lambda: transport.subscribe(topic, group="g", prefetch=1, lease=1.0).__aenter__(),
            lambda: transport.subscribe(topic, group=None, prefetch=1, lease=1.0, ordered=True).__aenter__(),
        ):
            with pytest.raises(TransportError, match="redis://") as caught:
                await ask()
            assert not isinstance(caught.value, Lost)
        async with transport.subscribe(topic, group=None, prefetch=1, lease=1.0) as listener:
            async with Redis.from_url(valkey.url) as client:
                await client.publish(topic, b"hello\nworld")
            [delivery] = await take(listener)
            assert delivery.wire == Wire("", b"hello\nworld")


# settling


@pytest.mark.parametrize("seconds", [-1, 30.1, float("inf"), float("nan")])
async def test_a_delay_beyond_the_lease_is_refused(valkey: Server, topic: str, seconds: float) -> None:
    """A retry can be delayed by a lease at most; nothing is settled by asking for more."""
    async with RedisTransport(valkey.url) as transport, group(transport, topic) as subscription:
        await transport.publish(topic, wires("1"))
        [delivery] = await take(subscription)
        with pytest.raises(ValueError, match="from 0 to a lease"):
            await delivery.retry(seconds)
        await delivery.ack()
        with pytest.raises(ValueError, match="prefetch"):
            async with group(transport, topic, prefetch=0):
                pass


async def test_a_message_whose_dead_copy_fails_is_not_lost(valkey: Server, client: Redis, topic: str) -> None:
    """When the dead stream cannot be written the message is not acknowledged, and comes again."""
    async with RedisTransport(valkey.url) as transport:
        await client.set(f"{topic}@g.dead", "in the way")
        async with group(transport, topic, lease=0.3) as subscription:
            await transport.publish(topic, wires("1"))
            [delivery] = await take(subscription)
            with pytest.raises(SettleError, match="cannot be kept"):
                await delivery.reject("bad")
            await client.delete(f"{topic}@g.dead")
            [delivery] = await take(subscription)
            assert (delivery.wire.id, delivery.attempt) == ("1", 2)
            await delivery.reject("bad")
    [(_, fields)] = await client.xrange(f"{topic}@g.dead")
    assert fields == {b"id": b"1", b"body": b"{}", b"reason": b"bad", b"attempt": b"2"}


async def test_only_what_was_tried_is_counted(valkey: Server, topic: str) -> None:
    """Handing back counts no attempt, a retry does, however short."""
    async with RedisTransport(valkey.url) as transport, group(transport, topic) as subscription:
        await transport.publish(topic, wires("1"))
        counts: list[int] = []
        for after in (0, 0, 0.001, 0, 0.1, None):
            [delivery] = await take(subscription)
            counts.append(delivery.attempt)
            await (delivery.ack() if after is None else delivery.retry(after))
        assert counts == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("prefetch", [20, 1_000])
async def test_of_what_is_acknowledged_together_only_what_was_taken_away_fails(
    prefetch: int, valkey: Server, client: Redis, topic: str
) -> None:
    """Among the acknowledgements of one turn, those of messages that another consumer has by now fail, and no other."""
    async with RedisTransport(valkey.url) as transport, group(transport, topic, prefetch=prefetch) as subscription:
        await transport.publish(topic, wires(*map(str, range(20))))
        deliveries = await take(subscription, 20)
        held = await client.xpending_range(topic, "g", "-", "+", 20)
        taken = [one["message_id"] for one in held][4:8]
        await client.xclaim(topic, "g", "thief", 0, taken)
        failed = list[str]()

        async def acknowledge(delivery: Delivery) -> None:
            try:
                await delivery.ack()
            except SettleError:
                failed.append(delivery.wire.id)

        async with anyio.create_task_group() as tasks:
            for delivery in deliveries:
                tasks.start_soon(acknowledge, delivery)
        left = await client.xpending_range(topic, "g", "-", "+", 20)
    assert sorted(failed) == ["4", "5", "6", "7"]
    assert [(one["message_id"], one["consumer"]) for one in left] == [(id_, b"thief") for id_ in taken]


async def test_a_header_that_json_cannot_carry_is_refused(valkey: Server, topic: str) -> None:
    """Half a surrogate pair in a header is refused by itself; the other messages arrive."""
    async with RedisTransport(valkey.url) as transport, group(transport, topic) as subscription:
        with pytest.raises(PublishError) as caught:
            await transport.publish(topic, [Wire("1", b"{}", {"x": "\ud800"}), Wire("2", b"{}", {"x": "y"})])
        assert isinstance(caught.value.failed[0], Refused)
        assert [*caught.value.failed] == [0]
        assert ids(await take(subscription)) == ["2"]


async def test_a_subscription_that_was_left_settles_nothing(valkey: Server, topic: str) -> None:
    """Behind the subscription every verb is a SettleError."""
    async with RedisTransport(valkey.url) as transport:
        async with group(transport, topic) as subscription:
            await transport.publish(topic, wires("1", "2", "3", "4"))
            held = await take(subscription, 4)
        for verb in (held[0].ack, lambda: held[1].retry(0), lambda: held[2].reject("x"), held[3].extend):
            with pytest.raises(SettleError):
                await verb()


async def test_what_nobody_received_is_handed_back(valkey: Server, client: Redis, topic: str) -> None:
    """Leaving hands back what was only fetched, without waiting for the lease; a consumer with nothing is forgotten."""
    async with RedisTransport(valkey.url) as transport:
        async with group(transport, topic) as subscription:
            await transport.publish(topic, wires("1", "2", "3"))
            await (await take(subscription))[0].ack()
            await until(lambda: _pending(client, topic, 2))
        async with group(transport, topic) as subscription:
            again = await take(subscription, 2)
            assert [(one.wire.id, one.attempt) for one in again] == [("2", 1), ("3", 1)]
            for one in again:
                await one.ack()
    assert len(await client.xinfo_consumers(topic, "g")) == 1, "the first still had something when it left"


async def _pending(client: Redis, topic: str, count: int) -> bool:
    return (await client.xpending(topic, "g"))["pending"] == count


# order


async def test_an_owner_that_hung_is_told(valkey: Server, client: Redis, topic: str) -> None:
    """When another consumer has become the owner meanwhile, the former one takes nothing more."""
    async with RedisTransport(valkey.url) as transport, group(transport, topic, ordered=True) as first:
        await transport.publish(topic, wires("1", key="k"))
        [held] = await take(first)
        await client.set(f"{topic}@g.owner", "another")
        await transport.publish(topic, wires("2", key="k"))
        with pytest.raises(Lost, match="has another owner"):
            await take(first)
        async with group(transport, topic, ordered=True) as second:
            await quiet(second)
            await client.delete(f"{topic}@g.owner")
            assert ids(await take(second, 2)) == ["1", "2"]
            with pytest.raises(SettleError, match="lease"):
                await held.ack()


async def test_a_successor_takes_what_was_to_come_later_too(valkey: Server, topic: str) -> None:
    """What the former owner had postponed is taken over in its place, so that nothing overtakes it."""
    async with RedisTransport(valkey.url) as transport:
        async with group(transport, topic, ordered=True) as first:
            await transport.publish(topic, wires("1", "2", key="k"))
            held = await take(first, 2)
            await held[0].retry(20)
        async with group(transport, topic, ordered=True, prefetch=1) as second:
            for expected in ("1", "2"):
                [delivery] = await take(second)
                assert delivery.wire.id == expected
                await delivery.ack()


async def test_room_is_kept_for_what_the_others_wait_for(valkey: Server, topic: str) -> None:
    """A postponed message finds its room again, though enough of its key wait to fill it; across a succession too."""
    async with RedisTransport(valkey.url) as transport:
        for _ in range(2):
            async with group(transport, topic, ordered=True, prefetch=3) as subscription:
                await transport.publish(topic, wires(*"123456", key="k"))
                held = await take(subscription, 3)
                await held[0].retry(0.3)
                again = await take(subscription)
                assert ids(again) == ids(held[:1])
                await again[0].retry(0)
                assert ids(await take(subscription)) == ids(held[:1])


async def test_an_owner_keeps_the_group_while_its_handlers_work(valkey: Server, topic: str) -> None:
    """Holding all it may for longer than a lease, extended, the owner stays the owner."""
    async with (
        RedisTransport(valkey.url) as transport,
        group(transport, topic, ordered=True, prefetch=1, lease=0.4) as first,
        group(transport, topic, ordered=True, prefetch=1, lease=0.4) as second,
    ):
        await transport.publish(topic, wires("1", "2", key="k"))
        async with anyio.create_task_group() as tasks:
            got: list[str] = []

            async def work(subscription: Subscription) -> None:
                while True:
                    delivery = await subscription.receive()
                    got.append(delivery.wire.id)
                    for _ in range(8):
                        await anyio.sleep(0.1)  # how long the handler works: two leases
                        await delivery.extend()
                    await delivery.ack()

            tasks.start_soon(work, first)
            tasks.start_soon(work, second)
            await until(lambda: _count(got, 2))
            tasks.cancel_scope.cancel()
        assert got == ["1", "2"]


async def _count(got: Sequence[object], count: int) -> bool:
    return len(got) >= count


async def test_an_owner_that_stopped_keeps_the_group_until_it_leaves(valkey: Server, topic: str) -> None:
    """Draining for longer than a lease, what is still handled is nobody else's, nor what comes after it."""
    async with RedisTransport(valkey.url) as transport:
        first = group(transport, topic, ordered=True, lease=0.4)
        owner = await first.__aenter__()
        async with group(transport, topic, ordered=True, lease=0.4) as heir:
            await transport.publish(topic, wires("1", "2", key="k"))
            held = await take(owner, 2)
            await owner.stop()
            for _ in range(3):
                for delivery in held:
                    await delivery.extend()
                await quiet(heir)
            await held[0].ack()
            await held[1].retry(0)
            await quiet(heir)
            await first.__aexit__(None, None, None)
            assert ids(await take(heir)) == ["2"]


# keeping tidy


@pytest.mark.parametrize("trim", ["yes", "no"])
async def test_what_every_group_has_settled_is_trimmed(
    valkey: Server, client: Redis, topic: str, trim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream loses what all groups are done with, never what one of them still needs; ?trim=no keeps all."""
    monkeypatch.setattr(_redis_group, "TIDY_EVERY", 0.0)
    await client.config_set("stream-node-max-entries", 10)
    names = [str(number) for number in range(100)]
    async with RedisTransport(f"{valkey.url}?trim={trim}") as transport:
        await transport.declare(topic, ["slow"])
        async with group(transport, topic, "fast", prefetch=100) as fast:
            await transport.publish(topic, wires(*names))
            for delivery in await take(fast, 100):
                await delivery.ack()
            await quiet(fast)
            assert await client.xlen(topic) == 100
            async with group(transport, topic, "slow", prefetch=100) as slow:
                held = await take(slow, 100)
                assert ids(held) == names
                for delivery in held[:50]:
                    await delivery.ack()
                await quiet(slow)
                assert await client.xlen(topic) == (50 if trim == "yes" else 100)
                for delivery in held[50:]:
                    await delivery.ack()
                await quiet(slow)
                assert await client.xlen(topic) == (10 if trim == "yes" else 100)


async def test_consumers_that_died_with_nothing_are_forgotten(
    valkey: Server, client: Redis, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that is silent and has nothing is removed; one that still has something is not."""
    monkeypatch.setattr(_redis_group, "TIDY_EVERY", 0.0)
    monkeypatch.setattr(_redis_group, "FORGET_AFTER", 250)
    async with RedisTransport(valkey.url) as transport:
        await transport.declare(topic, ["g"])
        await transport.publish(topic, wires("1"))
        await client.xreadgroup("g", "holds", {topic: ">"})
        await client.xgroup_createconsumer(topic, "g", "died")
        async with group(transport, topic) as subscription:
            await until(lambda: _consumers(client, topic, 2))
            await quiet(subscription)
            assert b"holds" in [one["name"] for one in await client.xinfo_consumers(topic, "g")]


async def _consumers(client: Redis, topic: str, count: int) -> bool:
    return len(await client.xinfo_consumers(topic, "g")) == count


async def test_a_server_that_forbids_tidying_is_let_be(
    valkey: Server, client: Redis, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the right to look at groups nothing is trimmed, which the log says once, and consuming goes on."""
    monkeypatch.setattr(_redis_group, "TIDY_EVERY", 0.0)
    await client.execute_command("ACL", "SETUSER", "ann", "reset", "on", ">x", "~*", "+@all", "-xinfo")
    transport = RedisTransport(valkey.url.replace("redis://", "redis://ann:x@"))
    async with transport, group(transport, topic) as subscription:
        for name in ("1", "2"):
            await transport.publish(topic, wires(name))
            assert ids(await take(subscription)) == [name]
    assert caplog.text.count("is not trimmed from here") == 1


async def test_a_prefix_keeps_two_applications_apart(valkey: Server, client: Redis, topic: str) -> None:
    """With ?prefix= every key on the server begins so, and streams of equal topics do not meet."""
    async with RedisTransport(f"{valkey.url}?prefix=shop:") as transport, group(transport, topic) as subscription:
        await transport.publish(topic, wires("1", "2"))
        await (await take(subscription))[0].reject("bad")
    assert sorted(await client.keys(f"*{topic}*")) == [f"shop:{topic}".encode(), f"shop:{topic}@g.dead".encode()]
