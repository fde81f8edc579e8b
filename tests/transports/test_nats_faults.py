"""NATS loses its server, its connection, its consumers and its rights, and nothing that was confirmed is lost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest
from nats.aio.client import Client

from eventbus.clock import new_id
from eventbus.errors import Lost, MissingExtraError, PublishError, Refused, SettleError
from eventbus.limits import Limits
from eventbus.testing.exam_bench import until
from eventbus.transport import Delivery, Subscription, Transport, Wire, connect
from eventbus.transports import _nats_address as names
from tests.servers import nats as nats_recipe
from tests.servers.fixtures import Absent, provide
from tests.servers.proxy import Fault, Proxy
from tests.servers.server import Server

pytestmark = pytest.mark.timeout(120)

LEASE = 1.0
SECRET = "no-one-may-see-this"


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Run on asyncio: the client knows no other."""
    return "asyncio"


@pytest.fixture
def topic() -> str:
    return f"faults.{new_id()}"


@asynccontextmanager
async def api(url: str) -> AsyncGenerator[Callable[..., Any]]:
    """Yield what asks JetStream, as an operator does."""
    client = Client()
    await client.connect(url)

    async def ask(verb: str, body: object = None) -> dict[str, Any]:
        answer = await client.request(f"$JS.API.{verb}", b"" if body is None else json.dumps(body).encode(), timeout=5)
        found: dict[str, Any] = json.loads(answer.data)
        assert "error" not in found, found
        return found

    try:
        yield ask
    finally:
        await client.close()


async def take(subscription: Subscription, count: int, within: float = 5.0) -> list[Delivery]:
    taken: list[Delivery] = []
    with anyio.fail_after(within):
        while len(taken) < count:
            taken.append(await subscription.receive())
    return taken


def wires(*ids: str, key: str | None = None) -> list[Wire]:
    return [Wire(id, b"{}", key=key) for id in ids]


def numbered(count: int, key: str | None = None) -> list[Wire]:
    return [Wire(new_id(), b"%d" % number, key=key) for number in range(count)]


def group(transport: Transport, topic: str, *, prefetch: int = 10, lease: float = LEASE, ordered: bool = False):
    return transport.subscribe(topic, group="g", prefetch=prefetch, lease=lease, ordered=ordered)


@pytest.mark.parametrize("verb", ["CONSUMER.DELETE.{stream}.g", "STREAM.DELETE.{stream}"])
async def test_what_is_deleted_while_it_is_used_is_lost_and_comes_back_by_subscribing(
    nats: Server, topic: str, verb: str
) -> None:
    async with connect(nats.url) as transport, api(nats.url) as ask:
        async with group(transport, topic) as subscription:
            await transport.publish(topic, wires("before"))
            [delivery] = await take(subscription, 1)  # so its request has arrived, and can be answered
            await delivery.ack()
            await ask(verb.format(stream=names.stream_of(topic)))
            with anyio.fail_after(5), pytest.raises(Lost, match="gone"):
                await subscription.receive()
        async with group(transport, topic) as subscription:
            await transport.publish(topic, wires("after"))
            after = await take(subscription, 1 if "STREAM" in verb else 2)  # a new group starts with all there is
            assert "after" in {delivery.wire.id for delivery in after}


@pytest.mark.parametrize("verb", ["CONSUMER.DELETE.{stream}.g", "STREAM.DELETE.{stream}"])
async def test_what_is_deleted_before_it_is_asked_is_lost_all_the_same(nats: Server, topic: str, verb: str) -> None:
    async with connect(nats.url) as transport, api(nats.url) as ask, group(transport, topic) as subscription:
        await ask(verb.format(stream=names.stream_of(topic)))
        with anyio.fail_after(15), pytest.raises(Lost, match=r"gone|no sign"):
            await subscription.receive()


async def test_a_stream_deleted_while_nobody_subscribes_is_made_again_by_publishing(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport, api(nats.url) as ask:
        await transport.publish(topic, wires("1"))
        await ask(f"STREAM.DELETE.{names.stream_of(topic)}")
        await transport.publish(topic, wires("2", "3"))
        async with group(transport, topic) as subscription:
            assert {delivery.wire.id for delivery in await take(subscription, 2)} == {"2", "3"}


async def test_settling_with_a_deleted_consumer_is_an_error(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport, api(nats.url) as ask, group(transport, topic, prefetch=1) as one:
        await transport.publish(topic, wires("1"))
        [delivery] = await take(one, 1)
        await ask(f"CONSUMER.DELETE.{names.stream_of(topic)}.g")
        with anyio.fail_after(5), pytest.raises(SettleError, match="gone"):
            await delivery.ack()


async def test_nothing_dies_without_its_dead_copy(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport, api(nats.url) as ask:
        async with group(transport, topic) as subscription:
            await transport.publish(topic, wires("1"))
            [delivery] = await take(subscription, 1)
            await ask(f"STREAM.DELETE.{names.dead_stream_of(topic)}")
            with pytest.raises(SettleError, match="comes again"):
                await delivery.reject("bad")
            with pytest.raises(Lost, match="dead"):
                await subscription.receive()
        async with group(transport, topic) as subscription:
            [delivery] = await take(subscription, 1)
            await delivery.reject("bad")
            info = await ask(f"STREAM.INFO.{names.dead_stream_of(topic)}")
            assert info["state"]["messages"] == 1


async def test_a_lease_is_kept_by_extending_and_lost_by_waiting(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport, group(transport, topic) as one, group(transport, topic) as other:
        await transport.publish(topic, wires("1"))
        held: list[tuple[Delivery, Subscription]] = []

        async def receive(subscription: Subscription) -> None:
            held.append((await subscription.receive(), subscription))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive, one)
            tasks.start_soon(receive, other)
            await until(lambda: bool(held), 5.0, "it did not come")
            for _ in range(6):
                await anyio.sleep(LEASE / 2)
                await held[0][0].extend()
            assert len(held) == 1
            tasks.cancel_scope.cancel()
        [again] = await take(other if held[0][1] is one else one, 1, within=LEASE + 2)
        assert again.attempt > 1  # it may have come to who held it, and waited there
        for verb in (held[0][0].extend, held[0][0].ack):
            with pytest.raises(SettleError, match="lease"):
                await verb()
        await again.ack()
    async with api(nats.url) as ask:
        info = await ask(f"CONSUMER.INFO.{names.stream_of(topic)}.g")
        assert (info["num_ack_pending"], info["num_pending"]) == (0, 0)


async def test_a_retry_outlives_a_restart_of_the_server(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport, group(transport, topic) as subscription:
        await transport.publish(topic, wires("1"))
        [delivery] = await take(subscription, 1)
        await delivery.retry(2.0)
        nats.restart()
        with anyio.fail_after(5), pytest.raises(Lost):
            await subscription.receive()
        with pytest.raises(PublishError) as caught:
            await transport.publish(topic, wires("2"))
        assert isinstance(caught.value.failed[0], Lost)
    async with connect(nats.url) as transport, group(transport, topic) as subscription:
        [delivery] = await take(subscription, 1)
        assert (delivery.wire.id, delivery.attempt) == ("1", 2)
        await delivery.ack()


async def test_acks_of_one_turn_go_out_in_one_write_and_are_answered_once(
    nats: Server, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nats.aio.transport import TcpTransport

    written: list[bytes] = []
    original = TcpTransport.writelines

    def writelines(self: TcpTransport, payload: list[bytes]) -> None:
        written.append(b"".join(payload))
        original(self, payload)

    async with connect(nats.url) as transport, group(transport, topic, prefetch=200, lease=30.0) as subscription:
        await transport.publish(topic, numbered(200))
        held = await take(subscription, 200)
        monkeypatch.setattr(TcpTransport, "writelines", writelines)
        async with anyio.create_task_group() as tasks:
            for delivery in held:
                tasks.start_soon(delivery.ack)
        acks = [text for text in written if b"+ACK" in text]
        assert [text.count(b"+ACK") for text in acks] == [200]
        assert acks[0].count(b"_INBOX") == 1 + acks[0].count(b"MSG.NEXT")
    async with api(nats.url) as ask:
        assert (await ask(f"CONSUMER.INFO.{names.stream_of(topic)}.g"))["num_ack_pending"] == 0


async def test_a_connection_that_hangs_is_lost_for_all_who_wait(nats: Server, topic: str) -> None:
    ends: list[BaseException] = []

    async def wait(operation: Callable[[], Any]) -> None:
        try:
            await operation()
        except (Lost, PublishError, SettleError) as error:
            ends.append(error)

    async with Proxy(nats.port).running() as proxy:
        with anyio.fail_after(15 + 3):
            async with connect(f"nats://127.0.0.1:{proxy.port}") as transport, group(transport, topic) as subscription:
                await transport.publish(topic, wires("1"))
                [delivery] = await take(subscription, 1)
                proxy.inject(Fault(does="black-hole"))
                with anyio.fail_after(15):
                    with anyio.move_on_after(0.1):  # who no longer waits is no trouble to those who do
                        await transport.publish(topic, wires("2"))
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(wait, subscription.receive)
                        tasks.start_soon(wait, delivery.ack)
                        for _ in range(8):  # more than the buffers of the connection hold
                            tasks.start_soon(wait, lambda: transport.publish(topic, [Wire(new_id(), b"x" * 1_000_000)]))
                assert len(ends) == 10
    async with connect(nats.url) as transport, group(transport, topic) as subscription:
        [again] = await take(subscription, 1)
        assert again.attempt > 1


async def test_a_server_that_freezes_with_full_buffers_does_not_hold_up_the_end(absent: Absent, topic: str) -> None:
    ends: list[BaseException] = []
    tasks_before = len(anyio.get_running_tasks())

    async def publish(transport: Transport) -> None:
        try:
            await transport.publish(topic, [Wire(new_id(), b"x" * 1_000_000)])
        except PublishError as error:
            ends.append(error)

    async with guarded(absent) as server:
        try:
            with anyio.fail_after(15 + 3):
                async with connect(server.url) as transport:
                    await transport.declare(topic, ())
                    os.kill(server.pid, signal.SIGSTOP)
                    async with anyio.create_task_group() as tasks:
                        for _ in range(20):
                            tasks.start_soon(publish, transport)
        finally:
            os.kill(server.pid, signal.SIGCONT)
    assert len(ends) == 20
    await until(lambda: len(anyio.get_running_tasks()) <= tasks_before, 5.0, "tasks were left")


async def test_who_leaves_an_ordered_subscription_lets_the_next_one_begin_at_once(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport:
        async with group(transport, topic, lease=30.0, ordered=True) as first:
            await transport.publish(topic, wires("1", key="k"))
            await transport.publish(topic, wires("2", key="k"))
            [delivery, _] = await take(first, 2)
            await delivery.ack()
        async with group(transport, topic, lease=30.0, ordered=True) as second:
            [delivery] = await take(second, 1, within=2.0)
            assert (delivery.wire.id, delivery.attempt) == ("2", 2)
            await delivery.ack()


@asynccontextmanager
async def guarded(absent: Absent, *options: str) -> AsyncGenerator[Server]:
    """Start a server with options of its own."""

    def make() -> Any:
        recipe = nats_recipe.recipe()
        return replace(recipe, command=lambda place: [*recipe.command(place), *options])

    with provide(make, absent) as server:
        yield server


async def test_wrong_credentials_are_refused_without_being_shown(
    absent: Absent, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with guarded(absent, "--user", "shop", "--pass", "right@/:") as server:
        right = connect(f"nats://shop:right%40%2F%3A@127.0.0.1:{server.port}")
        async with right:
            await right.publish(topic, wires("1"))
        for secret in (f"shop:{SECRET}@", f"{SECRET}@", "", f"shop:{SECRET}@127.0.0.1:1,"):
            wrong = connect(f"nats://{secret}127.0.0.1:{server.port}")
            with pytest.raises(Refused, match="does not let us in") as caught:
                await wrong.__aenter__()
            assert SECRET not in f"{caught.value} {caught.value!r} {wrong!r} {vars(wrong)}"
    assert SECRET not in caplog.text


async def test_credentials_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not there is Refused, and a library that is missing has its install line."""
    monkeypatch.setitem(sys.modules, "nkeys", ModuleType("nkeys"))
    with pytest.raises(Refused, match=r"does not let us in: .*No such file.*/nowhere\.nk"):
        await connect("nats://127.0.0.1:1?nkey=/nowhere.nk").__aenter__()
    monkeypatch.setitem(sys.modules, "nkeys", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'eventbus\[nats-nkeys\]'"):
        await connect("nats://127.0.0.1:1?credentials=/nowhere.creds").__aenter__()


async def test_a_token_lets_in(absent: Absent, topic: str) -> None:
    async with (
        guarded(absent, "--auth", "s3cret") as server,
        connect(f"nats://s3cret@127.0.0.1:{server.port}") as transport,
    ):
        await transport.publish(topic, wires("1"))


async def test_nothing_secret_goes_to_a_server_without_the_tls_that_was_asked_for(nats: Server, absent: Absent) -> None:
    async with guarded(absent, "--user", "shop", "--pass", SECRET) as server:
        with pytest.raises(Refused, match="nothing secret was sent"):
            await connect(f"nats://shop:{SECRET}@127.0.0.1:{server.port}?tls=true").__aenter__()
    with pytest.raises(Refused, match="offers no TLS"):
        await connect(f"{nats.url}?tls=true").__aenter__()


@pytest.fixture
def certificate(tmp_path: Path, absent: Absent) -> Path:
    """Return a directory with a certificate for this machine and its key."""
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/cert.pem"),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        absent("no openssl: install it")
    return tmp_path


async def test_tls_is_used_and_the_server_is_checked(absent: Absent, topic: str, certificate: Path) -> None:
    keys = ("--tls", "--tlscert", f"{certificate}/cert.pem", "--tlskey", f"{certificate}/key.pem")
    async with guarded(absent, *keys, "--user", "shop", "--pass", SECRET) as server:
        url = f"nats://shop:{SECRET}@127.0.0.1:{server.port}?tls=true"
        async with connect(f"{url}&tls_ca={certificate}/cert.pem") as transport:
            await transport.publish(topic, wires("1"))
        with pytest.raises(Lost, match=r"(?i)certificate"):
            await connect(url).__aenter__()


async def test_nobody_there_is_lost_soon(nats: Server) -> None:
    async with Proxy(nats.port).running() as proxy:
        port = proxy.port
        proxy.inject(Fault(does="black-hole"))
        with anyio.fail_after(10), pytest.raises(Lost, match="did not answer"):
            await connect(f"nats://127.0.0.1:{port}").__aenter__()
    with anyio.fail_after(5), pytest.raises(Lost, match="nobody answers"):
        await connect(f"nats://127.0.0.1:{port}").__aenter__()


async def test_a_server_that_is_too_old_is_refused(nats: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventbus.transports.nats.OLDEST", (99, 1))
    with pytest.raises(Refused, match=r"needs 99\.1 or later"):
        await connect(nats.url).__aenter__()


async def test_another_server_of_the_list_is_tried(nats: Server, topic: str) -> None:
    async with connect(f"nats://127.0.0.1:1,127.0.0.1:{nats.port}") as transport:
        await transport.publish(topic, wires("1"))


CHILD = """
import anyio, sys
from eventbus.transport import connect

async def main(url, topic, ordered):
    options = {"group": "g", "prefetch": 10, "lease": 2.0, "ordered": ordered == "1"}
    async with connect(url) as transport, transport.subscribe(topic, **options) as subscription:
        for _ in range(10):
            print(int((await subscription.receive()).wire.body), flush=True)
        await anyio.sleep_forever()

anyio.run(main, *sys.argv[1:])
"""


def child(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("ordered", "after", "size"), [(False, 0.0, 0), (True, 0.0, 0), (True, 0.0, 100_000), (True, 3.5, 100_000)]
)
async def test_what_a_killed_process_held_comes_to_another_within_its_lease(
    nats: Server, topic: str, ordered: bool, after: float, size: int
) -> None:
    """In order where order is kept, though the server sends it in another, and large messages one after another."""
    async with connect(nats.url) as transport:
        await transport.declare(topic, ["g"])
        for wire in numbered(30, key="k"):
            await transport.publish(topic, [replace(wire, body=wire.body + b" " * size)])
        command = [sys.executable, "-c", CHILD, nats.url, topic, str(int(ordered))]
        with child(command) as process:
            assert process.stdout is not None
            held = [int(await anyio.to_thread.run_sync(process.stdout.readline)) for _ in range(10)]
            await anyio.sleep(after)
            process.kill()
        got: list[int] = []
        async with group(transport, topic, lease=2.0, ordered=ordered) as subscription:
            with anyio.fail_after(2.0 + 2.0 + 6.0):
                while len({*got}) < 30:
                    delivery = await subscription.receive()
                    got.append(int(delivery.wire.body))
                    await delivery.ack()
    assert sorted(got) == [*range(30)]
    assert held == [*range(10)]
    assert not ordered or got == [*range(30)]


async def test_what_was_left_to_its_lease_comes_again_in_order(nats: Server, topic: str) -> None:
    """Who is pinned and lets its leases run out ends, so that nothing overtakes what comes again."""
    async with (
        connect(nats.url) as one,
        connect(nats.url) as other,
        group(one, topic, prefetch=10, lease=2.0, ordered=True) as first,
    ):
        await one.publish(topic, numbered(10, key="k"))
        held = await take(first, 10)
        with anyio.fail_after(2.0 + LEASE), pytest.raises(Lost, match="run out"):
            await first.receive()
        with pytest.raises(SettleError):
            await held[0].ack()
        async with group(other, topic, prefetch=10, lease=2.0, ordered=True) as second:
            again = await take(second, 10, 10.0)
            assert [int(delivery.wire.body) for delivery in again] == [*range(10)]
            for delivery in again:
                await delivery.ack()


async def test_a_pinned_consumer_without_credit_stays_pinned(nats: Server, topic: str) -> None:
    """Who holds all it may hold says nothing for longer than a lease, and still nobody else gets the key."""
    async with connect(nats.url) as one, connect(nats.url) as other, anyio.create_task_group() as tasks:
        async with group(one, topic, prefetch=2, ordered=True) as first, group(other, topic, ordered=True) as second:
            await one.publish(topic, numbered(4, key="k"))
            held = await take(first, 2)
            for _ in range(8):
                with anyio.move_on_after(LEASE / 2):
                    await second.receive()
                    raise AssertionError("another consumer has its key")
                for delivery in held:
                    await delivery.extend()
            for delivery in held:
                await delivery.ack()
            for delivery in await take(first, 2):
                await delivery.ack()
        tasks.cancel_scope.cancel()


async def test_a_stream_that_is_there_is_used_as_it_is(nats: Server) -> None:
    place = f"own{new_id().replace('-', '')}"
    async with connect(nats.url) as transport, api(nats.url) as ask:
        await ask(f"STREAM.CREATE.{place}", {"name": place, "subjects": [f"{place}.>"], "max_msgs": 1_000})
        for topic in (f"{place}.a", f"{place}.b"):
            async with group(transport, topic) as subscription:
                await transport.publish(topic, wires(topic))
                [delivery] = await take(subscription, 1)
                await delivery.ack()
                assert delivery.wire.id == topic
        info = await ask(f"STREAM.INFO.{place}")
        assert (info["state"]["messages"], info["config"]["max_msgs"]) == (2, 1_000)


async def test_where_nothing_may_be_declared_what_is_missing_is_refused(nats: Server, topic: str) -> None:
    async with connect(f"{nats.url}?declare=false") as transport, api(nats.url) as ask:
        with pytest.raises(Refused, match="create one"):
            await transport.declare(topic, ["g"])
        with pytest.raises(PublishError, match="create one"):
            await transport.publish(topic, wires("1"))
        stream = names.stream_of(topic)
        await ask(f"STREAM.CREATE.{stream}", {"name": stream, "subjects": [topic]})
        with pytest.raises(Lost, match="leaves to you"):
            await group(transport, topic).__aenter__()
        config = {"durable_name": "g", "ack_policy": "explicit", "ack_wait": 10**9}
        await ask(f"CONSUMER.DURABLE.CREATE.{stream}.g", {"stream_name": stream, "config": config})
        with pytest.raises(Refused, match="keeps no order"):
            await group(transport, topic, ordered=True).__aenter__()
        async with group(transport, topic, lease=30.0) as subscription:
            await transport.publish(topic, wires("1"))
            [delivery] = await take(subscription, 1)
            [again] = await take(subscription, 1)
            assert again.attempt == 2
            with pytest.raises(SettleError, match="lease of 1 s"):
                await delivery.ack()


async def test_a_broadcast_subscriber_leaves_nothing_behind(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport, api(nats.url) as ask:
        async with transport.subscribe(topic, group=None, prefetch=1, lease=LEASE):
            info = await ask(f"CONSUMER.LIST.{names.stream_of(topic)}")
            [consumer] = info["consumers"]
            assert 0 < consumer["config"]["inactive_threshold"] <= 60 * 10**9
        assert (await ask(f"CONSUMER.LIST.{names.stream_of(topic)}"))["total"] == 0


async def test_what_the_server_would_refuse_is_refused_alone(nats: Server, topic: str) -> None:
    bad = [
        Wire("1", b"x" * 1_036_000, {f"h{number}": "v" * 4_000 for number in range(4)}),
        Wire("2\n", b""),
        Wire("3", b"", {"Nats-Rollup": "all"}),
        Wire("4", b"", {"a b": ""}),
        Wire("5", b"", {"a": " blank"}),
        Wire("6", b"", {"a": "two\nlines"}),
        Wire("7", b"", {"Status": "404", "Description": "mine"}),
    ]
    async with connect(nats.url) as transport, group(transport, topic) as subscription:
        with pytest.raises(PublishError) as caught:
            await transport.publish(topic, bad)
        assert {index: type(error) for index, error in caught.value.failed.items()} == dict.fromkeys(range(6), Refused)
        [delivery] = await take(subscription, 1)
        assert (delivery.wire.id, delivery.wire.headers) == ("7", bad[6].headers)


async def test_keys_and_ids_come_back_as_they_were(nats: Server, topic: str) -> None:
    sent = {f"{number}": key for number, key in enumerate([" blank ", "a%20b", "line\nbreak", "", "\N{SNOWMAN}", None])}
    async with connect(nats.url) as transport, group(transport, topic) as subscription:
        await transport.publish(topic, [Wire(id, b"", key=key) for id, key in sent.items()])
        assert {one.wire.id: one.wire.key for one in await take(subscription, len(sent))} == sent


async def test_the_largest_message_can_die_of_the_longest_reason(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport, group(transport, topic, lease=30.0) as subscription:
        await transport.publish(topic, [Wire("1", b"x" * transport.capabilities.max_bytes, {"h": "v" * 3_900})])
        [delivery] = await take(subscription, 1)
        await delivery.reject("\N{SNOWMAN}" * 2_000)
        await transport.publish(topic, wires("2"))
        assert [one.wire.id for one in await take(subscription, 1)] == ["2"]


async def test_headers_are_written_and_read_as_any_client_of_nats_does(nats: Server, topic: str) -> None:
    """Letters of any script, colons, blanks within and empty values travel, in both directions."""
    odd = {"a": "é \N{SNOWMAN}", "B": "c: d", "empty": "", "two": "x  y", "tab": "x\ty", "quote": '100% "', "nats": "!"}
    sent = {**odd, "Nats-Msg-Id": "1", "eventbus-key": "k%20%C3%A9"}
    client = Client()
    await client.connect(nats.url)
    async with connect(nats.url) as transport, group(transport, topic) as subscription:
        await transport.publish(topic, [Wire("1", b"{}", odd, "k é")])
        message = await (await client.jetstream().subscribe(topic, ordered_consumer=True)).next_msg()
        assert (message.headers, message.data) == (sent, b"{}")
        await client.jetstream().publish(
            topic, b"{}", headers={**sent, "Nats-Msg-Id": "2", "Nats-Expected-Stream": names.stream_of(topic)}
        )
        assert [one.wire for one in await take(subscription, 2)] == [Wire(id, b"{}", odd, "k é") for id in "12"]
    await client.close()


async def test_a_dead_copy_that_no_server_takes_costs_nobody_the_connection(nats: Server, topic: str) -> None:
    client = Client()
    await client.connect(nats.url)
    async with connect(nats.url) as transport, group(transport, topic, lease=30.0) as subscription:
        await client.jetstream().publish(topic, b"x" * client.max_payload)
        [delivery] = await take(subscription, 1)
        with pytest.raises(SettleError, match="bytes are more than"):
            await delivery.reject("bad")
        await transport.publish(topic, wires("2"))
        assert [one.wire.id for one in await take(subscription, 1)] == ["2"]
    await client.close()


async def test_what_is_on_its_way_when_a_subscription_stops_comes_at_once_to_the_next(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport:
        await transport.publish(topic, [replace(wire, body=b"x" * 2_000) for wire in numbered(200)])
        async with group(transport, topic, prefetch=200, lease=30.0) as first:
            await take(first, 1)
            await first.stop()
        async with group(transport, topic, prefetch=200, lease=30.0) as second:
            assert len({delivery.wire.id for delivery in await take(second, 200)}) == 200


@pytest.mark.parametrize("scheme", ["nats", "nats+core"])
async def test_what_cannot_be_written_is_lost(
    nats: Server, topic: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise OSError("broken")

    async with connect(f"{scheme}{nats.url.removeprefix('nats')}") as transport:
        await transport.publish(topic, wires("1"))
        with monkeypatch.context() as patch:
            patch.setattr(Client, "_send_command", fail)
            with anyio.fail_after(2), pytest.raises(PublishError, match="broken") as caught:
                await transport.publish(topic, wires("2"))
            assert isinstance(caught.value.failed[0], Lost)


async def test_a_verb_after_leaving_is_an_error(nats: Server, topic: str) -> None:
    async with connect(nats.url) as transport:
        async with group(transport, topic) as subscription:
            await transport.publish(topic, wires("1", "2"))
            held = await take(subscription, 2)
        for delivery in held:
            with pytest.raises(SettleError, match="goes to another"):
                await delivery.ack()
            with pytest.raises(SettleError, match="goes to another"):
                await delivery.reject("bad")


async def test_a_full_stream_loses_nothing_and_takes_nothing(nats: Server, topic: str) -> None:
    async with connect(f"{nats.url}?max_bytes=3000&max_age=3600") as transport, api(nats.url) as ask:
        await transport.publish(topic, [Wire("1", b"x" * 2_000)])
        with pytest.raises(PublishError, match="maximum bytes") as caught:
            await transport.publish(topic, [Wire("2", b"x" * 2_000)])
        assert isinstance(caught.value.failed[0], Lost)
        async with group(transport, topic) as subscription:
            assert [delivery.wire.id for delivery in await take(subscription, 1)] == ["1"]
        config = (await ask(f"STREAM.INFO.{names.stream_of(topic)}"))["config"]
        assert (config["max_age"], config["discard"]) == (3600 * 10**9, "new")


async def test_a_message_of_another_client_has_a_name_of_its_own(nats: Server, topic: str) -> None:
    client = Client()
    await client.connect(nats.url)
    async with connect(nats.url) as transport, group(transport, topic) as subscription:
        await client.jetstream().publish(topic, b"{}")
        [first] = await take(subscription, 1)
        await first.retry(0)
        [again] = await take(subscription, 1)
        assert first.wire.id == again.wire.id == f"{names.stream_of(topic)}:1"
        assert (first.wire.key, dict(first.wire.headers)) == (None, {})
        await again.ack()
    await client.close()


async def test_a_listener_of_core_nats_that_falls_behind_is_told(nats: Server, topic: str) -> None:
    url = f"nats+core{nats.url.removeprefix('nats')}"
    async with connect(url, Limits(queue=3)) as transport:
        with pytest.raises(Refused, match="JetStream"):
            await group(transport, topic).__aenter__()
        async with transport.subscribe(topic, group=None, prefetch=1, lease=LEASE) as slow:
            await transport.publish(topic, wires("1", "2", "3", "4"))
            async with transport.subscribe(topic, group=None, prefetch=1, lease=LEASE) as quick:
                await transport.publish(topic, wires("5"))
                [delivery] = await take(quick, 1)
                assert delivery.wire.id == "5"
            with pytest.raises(Lost, match="more than 3 messages behind"):
                await slow.receive()


@pytest.mark.parametrize("scheme", ["nats", "nats+core"])
@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_another_event_loop_is_refused(anyio_backend: str, scheme: str) -> None:
    with pytest.raises(Exception, match="asyncio only"):
        await connect(f"{scheme}://localhost").__aenter__()


@pytest.mark.parametrize(
    "tail",
    [
        *("?colour=red", "?tls=1", "?tls=true&tls=true", "?replicas=0", "?replicas=x", "?max_age=-1", "?name="),
        *("/path", "#part", ":port", ",", "?max_bytes"),
    ],
)
def test_a_url_with_anything_unknown_is_refused(tail: str) -> None:
    with pytest.raises(ValueError, match="nats://") as caught:
        connect(f"nats://user:{SECRET}@localhost{tail}")
    assert SECRET not in str(caught.value)


def test_core_nats_has_no_options_of_jetstream() -> None:
    with pytest.raises(ValueError, match="tls_first"):
        connect("nats+core://localhost?replicas=3")


def test_a_missing_client_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(ImportError, match=r"pip install 'eventbus\[nats\]'"):
        connect("nats://localhost")


def test_names_differ_where_topics_differ() -> None:
    topics = ["a.b", "a_b", "a-b", "a b", "a.b.c", "a*", "a>", "$a", "x" * 300, "x" * 301, ".", "\N{SNOWMAN}"]
    assert len({names.stream_of(topic) for topic in topics}) == len(topics)
    assert len({names.subject_of(topic) for topic in topics}) == len(topics)
    assert names.subject_of("shop.order_placed") == "shop.order_placed"
    for topic in topics:
        assert len(names.stream_of(topic)) <= 180
