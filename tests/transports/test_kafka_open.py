"""A kafka:// URL is read strictly, lets in who may come in, and says why somebody may not."""

import asyncio
import logging
import sys

import anyio
import pytest

from eventbus.clock import new_id
from eventbus.errors import Lost, MissingExtraError, Refused, TransportError
from eventbus.transport import Wire, connect
from eventbus.transports.kafka import KafkaTransport
from tests.servers.kafka import PASSWORD, PEM, USER
from tests.servers.server import Server

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def topic() -> str:
    return f"test.{new_id()}"


async def test_credentials(kafka: Server, topic: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who logs in over TLS is let in; a wrong password is named as the trouble, and shown nowhere."""
    if kafka.foreign:
        pytest.skip("the users of a Kafka of somebody else are not known")
    caplog.set_level(logging.DEBUG)
    host = f"127.0.0.1:{kafka.port + 2}"
    trust = f"cafile={kafka.place.directory / PEM}"
    async with (
        connect(f"kafka+ssl://{USER}:{PASSWORD}@{host}?{trust}") as transport,
        transport.subscribe(topic, group="g", prefetch=1, lease=30.0) as subscription,
    ):
        await transport.publish(topic, [Wire("1", b"{}")])
        with anyio.fail_after(10):
            assert (await subscription.receive()).wire.id == "1"
    refused = connect(f"kafka+ssl://{USER}:not-{PASSWORD}@{host}?{trust}")
    with pytest.raises(Refused, match=rf"{host} does not let us in: .*Authentication") as caught:
        await refused.__aenter__()
    beside = connect(f"kafka+ssl://{USER}:not-{PASSWORD}@127.0.0.1:1,{host}?{trust}")  # one that is away hides nothing
    with pytest.raises(Refused, match=r"does not let us in: .*Authentication"):
        await beside.__aenter__()
    texts = [caplog.text, repr(refused), repr(refused.cluster), *map(str, (caught.value, caught.value.__context__))]
    assert not any(PASSWORD in text for text in texts)


async def test_an_opening_that_is_cut_leaves_nothing(kafka: Server) -> None:
    """Cancelled anywhere in its opening a transport closes again, and opens the next time."""
    tasks, filters = len(anyio.get_running_tasks()), len(logging.getLogger("aiokafka.conn").filters)
    transport = connect(kafka.url)
    for turns in range(12):
        opening = asyncio.ensure_future(transport.__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0 if turns < 6 else 0.002)
        opening.cancel()
        await asyncio.wait([opening])
        if not opening.cancelled():
            await transport.__aexit__(None, None, None)
        with anyio.fail_after(5):
            while len(anyio.get_running_tasks()) > tasks:  # noqa: ASYNC110 - others end them
                await anyio.sleep(0.01)
    async with transport:
        await transport.declare("test.opened", [])
    assert len(logging.getLogger("aiokafka.conn").filters) == filters


async def test_a_stranger_is_not_trusted(kafka: Server) -> None:
    """A certificate that nobody vouches for is named as the trouble, and no password is sent to it."""
    if kafka.foreign:
        pytest.skip("the users of a Kafka of somebody else are not known")
    with pytest.raises(Lost, match="certificate verify failed"):
        await connect(f"kafka+ssl://{USER}:{PASSWORD}@127.0.0.1:{kafka.port + 2}").__aenter__()
    with pytest.raises(TransportError, match="cafile, certfile or keyfile cannot be used"):
        await connect("kafka+ssl://localhost?cafile=/nowhere.pem").__aenter__()


async def test_nobody_there(topic: str) -> None:
    """A cluster that is away is Lost, with its address."""
    with anyio.fail_after(10), pytest.raises(Lost, match=r"kafka://127\.0\.0\.1:9: ConnectionRefusedError"):
        await connect("kafka://127.0.0.1:9").__aenter__()


def test_trio_is_refused() -> None:
    """Opened in trio's event loop it says what it runs on."""

    async def main() -> None:
        with pytest.raises(TransportError, match="runs on asyncio"):
            await connect("kafka://localhost").__aenter__()

    anyio.run(main, backend="trio")


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without aiokafka the error is the line that installs it."""
    monkeypatch.setitem(sys.modules, "aiokafka.admin", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'eventbus\[kafka\]'"):
        connect("kafka://localhost")


@pytest.mark.parametrize(
    ("url", "fault"),
    {
        "kafka://": "takes host:port",
        "kafka://a/b": "takes host:port",
        "kafka://a#b": "takes host:port",
        "kafka://a,,b": "takes host:port",
        "kafka://u:geheim@a?colour=red": "kafka:// takes the options sasl, declare",
        "kafka://a?sasl=PLAIN&sasl=PLAIN": "each once",
        "kafka://a?sasl=GSSAPI": "takes PLAIN, SCRAM-SHA-256",
        "kafka://a?declare=perhaps": "takes true or false",
        "kafka://a?partitions=0": "takes a whole number from 1",
        "kafka://a?cafile=/x": r"for kafka\+ssl",
    }.items(),
)
def test_a_url_is_read_strictly(url: str, fault: str) -> None:
    """What the URL says wrongly is an error that shows no password."""
    with pytest.raises(ValueError, match=fault) as caught:
        connect(url)
    assert "geheim" not in str(caught.value)


def test_a_url_says_everything() -> None:
    """Hosts, login, TLS and options come from the URL."""
    cluster = KafkaTransport.from_url("kafka+ssl://me:p%40ss@a,b:1,[::1]:2?sasl=scram-sha-512&max_bytes=5").cluster
    assert cluster.servers == ("a:9092", "b:1", "[::1]:2")
    assert (cluster.user, cluster.password, cluster.sasl, cluster.tls) == ("me", "p@ss", "SCRAM-SHA-512", True)
    options = cluster.client(5.0)
    assert (options["security_protocol"], options["request_timeout_ms"]) == ("SASL_SSL", 5_000)
    assert "p@ss" not in repr(cluster)
