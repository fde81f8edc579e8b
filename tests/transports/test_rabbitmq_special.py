"""What is special to RabbitMQ: its errors, names, headers and queues, and a bus on top of it."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aio_pika
import anyio
import pytest
import trio
from anyio.streams.buffered import BufferedByteReceiveStream
from pamqp.frame import unmarshal

from eventbus import Context, Event, EventBus, Module, Reject, Retry
from eventbus.clock import new_id
from eventbus.errors import (
    Lost,
    MissingExtraError,
    PublishError,
    Refused,
    SettleError,
    TransportError,
)
from eventbus.transport import Delivery, Subscription, Wire, connect
from eventbus.transports._rabbitmq_names import LONGEST, Topology, short
from eventbus.transports.rabbitmq import RabbitMQTransport
from tests.servers.server import Server

pytestmark = pytest.mark.timeout(300)  # RabbitMQ is slow to start, and the first test of a run waits for it


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio, which is what this transport promises."""
    return "asyncio"


@pytest.fixture
async def transport(rabbitmq: Server) -> AsyncGenerator[RabbitMQTransport]:
    """Yield an open transport."""
    async with RabbitMQTransport(rabbitmq.url) as transport:
        yield transport


@pytest.fixture
async def channel(rabbitmq: Server) -> AsyncGenerator[aio_pika.abc.AbstractChannel]:
    """Yield a channel beside the transport."""
    async with await aio_pika.connect(rabbitmq.url) as link:
        yield await link.channel()


@pytest.fixture
def topic() -> str:
    """Return a topic of this test's own."""
    return f"special.{new_id()}"


@asynccontextmanager
async def group(transport: RabbitMQTransport, topic: str, prefetch: int = 500) -> AsyncGenerator[Subscription]:
    async with transport.subscribe(topic, group="g", prefetch=prefetch, lease=30.0) as subscription:
        yield subscription


async def take(subscription: Subscription, within: float = 30.0) -> Delivery:
    with anyio.fail_after(within):
        return await subscription.receive()


@pytest.mark.parametrize(
    "url",
    [
        "amqp://", "amqp://h/?colour=red", "amqp://h/?timeout=soon", "amqp://h/?timeout=0", "amqp://h/?heartbeat=1e9",
        "amqp://h/?exchange=", "amqp://h/?exchange=a&exchange=b", "amqp://h/?declare=no", "amqp://h/?cafile=x",
        "amqp://u:secret@h/#x",
    ],
)  # fmt: skip
def test_a_url_is_read_strictly(url: str) -> None:
    """What the URL does not mean is an error that names no password."""
    with pytest.raises(ValueError, match=r".") as caught:
        connect(url)
    assert "secret" not in str(caught.value)


def test_an_unknown_option_names_the_known_ones() -> None:
    """A misspelt option is answered with all there are."""
    with pytest.raises(ValueError, match="takes the options cafile, certfile, declare, exchange"):
        connect("amqp://h/?hartbeat=1")


def test_the_password_is_never_shown() -> None:
    """Neither the transport nor what it holds shows user or password."""
    shown = RabbitMQTransport("amqps://shop:secret@h:1/v?timeout=5")
    assert repr(shown) == "RabbitMQTransport('amqps://h:1/v')"
    assert "secret" not in repr(vars(shown))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the client library the answer is the line that installs it."""
    for name in [name for name in sys.modules if "rabbitmq" in name and name.startswith("eventbus.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aio_pika", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'eventbus\[rabbitmq\]'"):
        connect("amqp://h/")


def test_trio_is_refused() -> None:
    """Opening it in another event loop says so, before anything is tried."""

    async def main() -> None:
        with pytest.raises(TransportError, match="runs on asyncio"):
            async with RabbitMQTransport("amqp://h/"):
                pass

    trio.run(main)


async def test_wrong_credentials_are_named(rabbitmq: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong password is Refused, and never shown; a virtual host that is not for us is named as what may be it."""
    url = rabbitmq.url.replace("guest:guest", "guest:secret1234")
    with pytest.raises(Refused, match=r"does not let us in: .*; correct the user name, the password") as caught:
        async with RabbitMQTransport(url):
            pass
    seen = [str(caught.value), caplog.text, repr(caught.value.__cause__)]
    assert not any("secret1234" in text for text in seen)
    with pytest.raises(Lost, match="is there this virtual host, and may the user use it"):
        async with RabbitMQTransport(f"{rabbitmq.url}nowhere"):
            pass


def test_names_that_are_too_long_stay_apart() -> None:
    """AMQP carries 255 bytes: what is longer keeps its beginning and gets a digest."""
    names = [short("\N{EURO SIGN}" * 200 + end) for end in ("a", "b")]
    assert names[0] != names[1]
    assert all(len(name.encode()) <= 240 for name in names)


@pytest.mark.parametrize(("after", "level", "digits"), [(0.001, 0, 1), (0.1, 0, 1), (0.7, 2, 7), (0.71, 3, 8)])
def test_a_delay_is_rounded_up_to_its_digits(after: float, level: int, digits: int) -> None:
    """A delay enters at its highest digit, and its key has them all."""
    top, key = Topology("x", passive=False, endless=False).delay("q", after)
    assert (top, int("".join(key.split(".")[:-1]), 2)) == (level, digits)
    assert Topology("x", passive=False, endless=False).delay("q", LONGEST)[0] == 15


async def test_a_delay_of_several_digits_is_kept(transport: RabbitMQTransport, topic: str) -> None:
    """What goes through several levels comes back on time, to its own group, with the next attempt."""
    async with group(transport, topic) as subscription:
        await transport.publish(topic, [Wire("1", b"x", {"a": "b"}, "k")])
        delivery = await take(subscription)
        await delivery.retry(0.7)  # which declares the levels, and that takes its time
        again = await take(subscription)
        assert (again.wire, again.attempt) == (delivery.wire, 2)
        start = anyio.current_time()
        await again.retry(0.7)
        again = await take(subscription)
        assert 0.7 <= anyio.current_time() - start < 6
        assert (again.wire, again.attempt) == (delivery.wire, 3)
        await again.retry(0)
        assert (await take(subscription)).attempt == 4


def frames(piece: bytes) -> list[Any]:
    found: list[Any] = []
    while piece:
        size, _, frame = unmarshal(piece)
        found.append(frame)
        piece = piece[size:]
    return found


@pytest.fixture
def written(transport: RabbitMQTransport, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Return the frames of every write of the transport itself, a list each."""
    found: list[list[Any]] = []
    for connection in cast("Any", transport)._line._connections:
        queue = connection.transport.connection.write_queue

        def put(frame: Any, put: Callable[[Any], None] = queue.put_nowait) -> None:
            found.append(frames(frame.payload))
            put(frame)

        monkeypatch.setattr(queue, "put_nowait", put)
    return found


async def test_acks_of_one_turn_leave_in_one_write(
    transport: RabbitMQTransport, topic: str, written: list[list[Any]]
) -> None:
    """200 acks at once are one frame, and with a gap one more for each behind the gap."""
    async with group(transport, topic) as subscription:
        await transport.publish(topic, [Wire(str(number), b"x") for number in range(210)])
        held = [await take(subscription) for _ in range(210)]
        written.clear()
        async with anyio.create_task_group() as tasks:
            for delivery in held[:200]:
                tasks.start_soon(delivery.ack)
        for delivery in held[205:]:
            await delivery.ack()
    assert [len(frames) for frames in written if frames[0].name == "Basic.Ack"] == [1, 5]
    async with group(transport, topic) as subscription:
        assert sorted([(await take(subscription)).wire.id for _ in range(5)]) == [str(one) for one in range(200, 205)]


async def test_what_one_turn_publishes_leaves_in_one_write(
    transport: RabbitMQTransport, topic: str, written: list[list[Any]]
) -> None:
    """50 callers at once are one write, in their order, with three frames for each message."""
    await transport.declare(topic, ["g"])
    written.clear()
    async with anyio.create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(transport.publish, topic, [Wire(str(number), b"x")])
    assert [len(frames) for frames in written] == [150]
    async with group(transport, topic) as subscription:
        assert [(await take(subscription)).wire.id for _ in range(50)] == [str(number) for number in range(50)]


async def test_partial_failure_names_the_failed(transport: RabbitMQTransport, topic: str) -> None:
    """Of a batch only what AMQP cannot carry is refused; the rest arrives."""
    heavy = {f"h{number}": "v" * 4_000 for number in range(64)}
    async with group(transport, topic) as subscription:
        with pytest.raises(PublishError) as caught:
            await transport.publish(topic, [Wire("0", b""), Wire("1", b"", heavy), Wire("2", b"", {"n" * 300: "v"})])
        assert {index: type(error) for index, error in caught.value.failed.items()} == {1: Refused, 2: Refused}
        assert (await take(subscription)).wire.id == "0"
        await transport.publish(topic, [Wire("3", b"")])
        assert (await take(subscription)).wire.id == "3"


async def test_what_a_full_queue_refuses_is_lost(
    transport: RabbitMQTransport, channel: aio_pika.abc.AbstractChannel, topic: str
) -> None:
    """Of a batch only what RabbitMQ itself does not take is named, and it may be tried again."""
    bounds: Any = {"x-max-length": 2, "x-overflow": "reject-publish"}
    queue = await channel.declare_queue(exclusive=True, arguments=bounds)
    await queue.bind("eventbus", topic)
    with pytest.raises(PublishError, match="takes no more messages") as caught:
        await transport.publish(topic, [Wire(str(number), b"") for number in range(4)])
    assert {index: type(error) for index, error in caught.value.failed.items()} == {2: Lost, 3: Lost}
    await queue.purge()
    await transport.publish(topic, [Wire("4", b"")])


async def test_headers_that_rabbitmq_obeys_are_only_carried(transport: RabbitMQTransport, topic: str) -> None:
    """Headers named like RabbitMQ's own, or ours, arrive unchanged and do nothing."""
    names = ("CC", "BCC", "x-delivery-count", "x-death", "x-eventbus-key", "x-tenant", "content-type")
    wire = Wire("\N{EURO SIGN}" * 200, b"x", dict.fromkeys(names, "9"), "")
    async with group(transport, topic) as subscription:
        await transport.publish(topic, [wire])
        delivery = await take(subscription)
        assert (delivery.wire, delivery.attempt) == (wire, 1)


async def test_messages_of_strangers_arrive(
    transport: RabbitMQTransport, channel: aio_pika.abc.AbstractChannel, topic: str
) -> None:
    """A message that somebody else published arrives as text, whatever its headers are."""
    async with group(transport, topic) as subscription:
        exchange = await channel.get_exchange("eventbus")
        odd: Any = {"n": 7, "t": {"a": [1]}, "x-eventbus-attempts": "many", "x-eventbus-key": 5}
        await exchange.publish(aio_pika.Message(b"x", headers=odd, content_type="text/plain"), topic)
        delivery = await take(subscription)
        assert (delivery.wire.key, delivery.attempt) == ("5", 1)
        assert dict(delivery.wire.headers) == {"content-type": "text/plain", "n": "7", "t": "{'a': [1]}"}


async def test_what_amqp_itself_can_carry_arrives(transport: RabbitMQTransport, topic: str) -> None:
    """Names of 255 bytes, an empty content type, text beyond ASCII, a body of many frames and none at all arrive."""
    wires = [
        Wire("1", b"", {"n" * 255: "\N{EURO SIGN}" * 100, "content-type": ""}),
        Wire("2", b"0123456789" * 60_000, {"content-type": "t" * 300}, "\N{EURO SIGN}"),
        Wire("", b"x", {"x-eventbus-key": "9"}),
    ]
    async with group(transport, topic) as subscription:
        await transport.publish(topic, wires)
        assert [(await take(subscription)).wire for _ in wires] == wires


async def test_what_is_no_text_is_refused(transport: RabbitMQTransport, topic: str) -> None:
    """A lone surrogate, which no encoding knows, is the fault of its own message."""
    wires = [Wire("\ud800", b""), Wire("1", b"", {"h": "\ud800"}), Wire("2", b"")]
    async with group(transport, topic) as subscription:
        with pytest.raises(PublishError) as caught:
            await transport.publish(topic, wires)
        assert {index: type(error) for index, error in caught.value.failed.items()} == {0: Refused, 1: Refused}
        assert (await take(subscription)).wire.id == "2"


async def test_the_same_id_at_once_is_told_apart(transport: RabbitMQTransport, topic: str) -> None:
    """One id published to a topic with and to one without listeners: only the one that nobody hears is Lost."""
    async with group(transport, topic) as subscription, anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(transport.publish, topic, [Wire("1", b"")])
            with pytest.raises(PublishError, match="nobody listens"):
                await transport.publish(f"{topic}.unheard", [Wire("1", b"")])
        assert [(await take(subscription)).wire.id for _ in range(10)] == ["1"] * 10


async def test_a_dead_copy_that_fails_settles_nothing(
    transport: RabbitMQTransport, channel: aio_pika.abc.AbstractChannel, topic: str
) -> None:
    """Where the dead queue is gone the rejected message comes back, and it dies once the queue is there again."""
    async with group(transport, topic) as subscription:
        await transport.publish(topic, [Wire("1", b"")])
        await channel.queue_delete(f"{topic}@g.dead")
        with pytest.raises(SettleError, match="handed back at once"):
            await (await take(subscription)).reject("bad")
        delivery = await take(subscription)
        await transport.declare(topic, ["g"])
        await delivery.reject("bad")
    queue = await channel.get_queue(f"{topic}@g.dead")
    dead = await queue.get()
    assert dead is not None
    ours = {name: value for name, value in dead.headers.items() if name.startswith("x-eventbus-")}
    assert ours == {"x-eventbus-reason": "bad", "x-eventbus-failures": 2, "x-eventbus-topic": topic}


async def test_a_queue_with_other_settings_is_refused(transport: RabbitMQTransport, topic: str) -> None:
    """A queue that cannot be what is asked for is left as it is, and both values are named."""
    await transport.declare(topic, ["g"])
    with pytest.raises(Refused, match=r"x-single-active-consumer.*received the value 'true'.*but current is none"):
        await transport.declare(topic, ["g"], ordered=["g"])
    await transport.declare(topic, ["g"])


async def test_nothing_is_declared_where_others_do_it(rabbitmq: Server, topic: str) -> None:
    """With declare=false a queue that is missing is refused, not made; one that is there is used."""
    async with RabbitMQTransport(f"{rabbitmq.url}?declare=false") as guest, RabbitMQTransport(rabbitmq.url) as owner:
        with pytest.raises(Refused, match="no queue"):
            await guest.declare(topic, ["g"])
        await owner.declare(topic, ["g"])
        async with group(guest, topic) as subscription:
            await guest.publish(topic, [Wire("1", b"")])
            await (await take(subscription)).retry(0.1)
            assert (await take(subscription)).attempt == 2


async def test_what_comes_back_to_nobody_is_kept(
    transport: RabbitMQTransport, channel: aio_pika.abc.AbstractChannel, topic: str
) -> None:
    """A delay that ends when its queue was deleted ends in the queue of strays, and holds nobody up."""
    async with group(transport, topic) as subscription:
        await transport.publish(topic, [Wire(topic, b"")])
        await (await take(subscription)).retry(0.3)
        await channel.queue_delete(f"{topic}@g")
        stray = await channel.get_queue("eventbus.stray")
        with anyio.fail_after(30):
            async with stray.iterator() as messages:
                async for message in messages:
                    await message.ack()
                    if message.message_id == topic:
                        break


async def test_what_is_due_while_rabbitmq_starts_is_no_stray(rabbitmq: Server, topic: str) -> None:
    """A delay that ends before the binding of its group is back is kept until it is, and then comes back."""
    async with RabbitMQTransport(rabbitmq.url) as transport, group(transport, topic) as subscription:
        await transport.publish(topic, [Wire(topic, b"")])
        await (await take(subscription)).retry(12.8)  # long enough to be stopped before
        due = anyio.current_time() + 12.8
        async with await aio_pika.connect(rabbitmq.url) as link:
            queue = await (await link.channel()).get_queue(f"{topic}@g")
            _, key = transport._line.topology.delay(queue.name, 0.1)
            await queue.unbind("eventbus.delay", f"#.{key.rpartition('.')[2]}")
        await anyio.to_thread.run_sync(rabbitmq.stop)
    await anyio.to_thread.run_sync(rabbitmq.start)
    async with await aio_pika.connect(rabbitmq.url) as link:
        stray = await (await link.channel()).get_queue("eventbus.stray")
        with anyio.move_on_after(max(due - anyio.current_time(), 0.0) + 8):
            async with stray.iterator() as messages:
                async for message in messages:
                    assert message.message_id != topic, "it passes for a stray"
    async with RabbitMQTransport(rabbitmq.url) as transport, group(transport, topic) as subscription:
        assert (await take(subscription)).wire.id == topic


@pytest.mark.parametrize("native", [True, False])
async def test_a_cancelled_close_is_a_whole_close(rabbitmq: Server, topic: str, native: bool) -> None:
    """Whoever cancels an open transport, when it has ended no connection and no task is left."""
    before = set(asyncio.all_tasks())
    ready = anyio.Event()

    async def hold() -> None:
        async with RabbitMQTransport(rabbitmq.url) as transport, group(transport, topic):
            ready.set()
            await anyio.sleep_forever()

    if native:
        task = asyncio.ensure_future(hold())
        await ready.wait()
        task.cancel()
        await asyncio.wait([task], timeout=0.002)  # once more in the middle of closing
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    else:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold)
            await ready.wait()
            tasks.cancel_scope.cancel()
    assert set(asyncio.all_tasks()) <= before


HOLDER = """
import anyio, sys
from eventbus.transports.rabbitmq import RabbitMQTransport

async def main():
    async with RabbitMQTransport(sys.argv[1]) as transport:
        async with transport.subscribe(sys.argv[2], group="g", prefetch=10, lease=30.0) as subscription:
            for _ in range(5):
                await subscription.receive()
            print("held", flush=True)
            await anyio.sleep_forever()

anyio.run(main)
"""


async def test_a_killed_consumer_gives_everything_back_at_once(
    rabbitmq: Server, transport: RabbitMQTransport, topic: str
) -> None:
    """What a process held when it was killed comes to the next one, and counts as a second delivery."""
    await transport.declare(topic, ["g"])
    await transport.publish(topic, [Wire(str(number), b"") for number in range(5)])
    command = [sys.executable, "-c", HOLDER, rabbitmq.url, topic]
    async with await anyio.open_process(command, stdin=subprocess.DEVNULL, stderr=None) as holder:
        assert holder.stdout is not None
        with anyio.fail_after(60):
            await BufferedByteReceiveStream(holder.stdout).receive_until(b"held\n", 100)
        holder.kill()
    async with group(transport, topic) as subscription:
        back = [await take(subscription) for _ in range(5)]
        assert [(one.wire.id, one.attempt) for one in back] == [(str(number), 2) for number in range(5)]
        for delivery in back:
            await delivery.ack()


class Happened(Event, name="special.happened", key="key"):
    number: int
    key: str = "k"


class Office:
    """Handle as told, and remember."""

    def __init__(self) -> None:
        self.name = f"special{new_id()}"
        self.seen: list[tuple[int, int]] = []
        self.module = Module("m")

        @self.module.on(Happened, retry=Retry(attempts=3, initial=0.1, jitter=False))
        async def note(event: Happened, ctx: Context) -> None:
            self.seen.append((event.number, ctx.attempt))
            if event.number == 1 and ctx.attempt == 1:
                raise OSError("again, please")
            if event.number == 2:
                raise Reject("never")

    async def until(self, *expected: tuple[int, int]) -> None:
        with anyio.fail_after(60):
            while sorted(self.seen) != sorted(expected):  # noqa: ASYNC110
                await anyio.sleep(0.02)


async def test_a_bus_without_a_store(rabbitmq: Server, channel: aio_pika.abc.AbstractChannel) -> None:
    """Handlers get what is published, with retries and dead messages of RabbitMQ itself."""
    office = Office()
    bus = EventBus(office.module, name=office.name, transports={"events": rabbitmq.url}, routes={"special.*": "events"})
    async with bus.running():
        for number in range(3):
            await bus.publish(Happened(number=number))
        await office.until((0, 1), (1, 1), (1, 2), (2, 1))
    dead = await (await channel.get_queue(f"special.happened@{office.name}/m.note.dead")).get()
    assert dead is not None
    assert dead.headers["x-eventbus-reason"] == "Reject: never"


async def test_a_bus_with_a_store(rabbitmq: Server, tmp_path: Path) -> None:
    """The same handlers with a store: published with a transaction, taken in once, dead and replayed in the store."""
    office = Office()
    bus = EventBus(
        office.module, name=office.name, transports={"events": rabbitmq.url}, routes={"special.*": "events"},
        store=f"sqlite:///{tmp_path}/bus.sqlite",
    )  # fmt: skip
    async with bus.running():
        async with bus.transaction():
            for number in range(3):
                await bus.publish(Happened(number=number))
        await office.until((0, 1), (1, 1), (1, 2), (2, 1))
        with anyio.fail_after(60):
            while not (dead := await bus.dead.find()):  # noqa: ASYNC110
                await anyio.sleep(0.02)
        assert [one.error for one in dead] == ["Reject: never"]
        assert await bus.dead.replay(dead[0].id) == 1
        await office.until((0, 1), (1, 1), (1, 2), (2, 1), (2, 1))
