"""The proxy does to connections what it is told, and nothing else."""

import socket
from collections.abc import AsyncIterator

import anyio
import pytest

from tests.servers.proxy import Fault, Proxy, receive, send


class Echo:
    """Answer every line with itself in capitals, and keep what came."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended = anyio.Event()

    async def serve(self, stream: anyio.abc.SocketStream) -> None:
        """Answer one client."""
        async with stream:
            try:
                async for data in stream:
                    self.heard += data
                    await stream.send(data.upper())
            except anyio.BrokenResourceError:
                pass
            finally:
                self.ended.set()


@pytest.fixture
async def echo() -> Echo:
    """Return what the server has heard."""
    return Echo()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    """Yield a proxy before a server that answers in capitals."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, echo.serve)
        async with Proxy(listener.extra(anyio.abc.SocketAttribute.local_port)).running() as proxy:
            yield proxy
        group.cancel_scope.cancel()


class Client:
    """Be a client on a bare socket, which shows a reset as what it is."""

    def __init__(self, proxy: Proxy) -> None:
        self.link = socket.create_connection(("127.0.0.1", proxy.port))
        self.link.setblocking(False)

    async def say(self, text: bytes) -> None:
        await send(self.link, text)

    async def hear(self) -> bytes:
        with anyio.fail_after(5):
            return await receive(self.link)

    async def hear_nothing(self) -> bool:
        with anyio.move_on_after(0.1) as waiting:
            await receive(self.link)
        return waiting.cancelled_caught


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    """Yield a client that is connected through the proxy."""
    client = Client(proxy)
    await client.say(b"hello")
    assert await client.hear() == b"HELLO"
    yield client
    client.link.close()


async def test_it_carries_bytes_unchanged(proxy: Proxy, client: Client) -> None:
    """Without a fault a megabyte goes there and comes back, and an end is passed on."""
    sent, back = bytes(range(65, 91)) * 40_000, b""
    async with anyio.create_task_group() as group:
        group.start_soon(client.say, sent)
        while len(back) < len(sent):
            back += await client.hear()
    assert back == sent
    client.link.shutdown(socket.SHUT_WR)
    assert await client.hear() == b""


async def test_a_drop_ends_in_order(proxy: Proxy, client: Client, echo: Echo) -> None:
    """A dropped connection reads as ended on both sides, and a new one works once it has struck often enough."""
    proxy.inject(Fault(does="drop", times=1))
    assert await client.hear() == b""
    with anyio.fail_after(5):
        await echo.ended.wait()
    other = Client(proxy)
    await other.say(b"again")
    assert await other.hear() == b"AGAIN"
    other.link.close()


async def test_a_reset_is_an_error(proxy: Proxy, client: Client) -> None:
    """A reset connection raises at the client."""
    proxy.inject(Fault(does="reset"))
    with pytest.raises(ConnectionResetError):
        await client.hear()


@pytest.mark.parametrize("passed", [True, False])
async def test_it_strikes_at_a_word(proxy: Proxy, client: Client, echo: Echo, passed: bool) -> None:
    """At its word, in any case and in any pieces, the connection breaks; the word arrives if it is to."""
    proxy.inject(Fault(does="reset", at=b"COMMIT", passed=passed, times=1))
    await client.say(b"insert; com")
    assert await client.hear() == b"INSERT; COM"
    await client.say(b"mit; more")
    with pytest.raises(ConnectionResetError):
        await client.hear()
    await proxy.struck()
    assert proxy.strikes == 1
    with anyio.fail_after(5):
        await echo.ended.wait()
    assert echo.heard == b"helloinsert; com" + (b"mit; more" if passed else b"")


async def test_what_stands_before_the_word_arrives(proxy: Proxy, client: Client, echo: Echo) -> None:
    """The bytes before the word go through, the word and what follows do not."""
    proxy.inject(Fault(does="drop", at=b"commit"))
    await client.say(b"insert; COMMIT; more")
    with anyio.fail_after(5):
        await echo.ended.wait()
    assert echo.heard == b"helloinsert; "


async def test_it_strikes_only_behind_another_word(proxy: Proxy, client: Client, echo: Echo) -> None:
    """A connection that has not carried the other word before is left alone."""
    proxy.inject(Fault(does="drop", at=b"commit", behind=b"insert"))
    await client.say(b"commit ")
    assert await client.hear() == b"COMMIT "
    await client.say(b"insert ")
    assert await client.hear() == b"INSERT "
    await client.say(b"commit")
    assert await client.hear() == b""
    assert echo.heard == b"hellocommit insert "


async def test_it_strikes_after_bytes(proxy: Proxy, client: Client, echo: Echo) -> None:
    """Behind so many bytes of the client, exactly, the connection is cut."""
    proxy.inject(Fault(does="drop", after=8))
    await client.say(b"abcdef")
    with anyio.fail_after(5):
        await echo.ended.wait()
    assert echo.heard == b"helloabc"


async def test_it_strikes_at_the_servers_words(proxy: Proxy, client: Client, echo: Echo) -> None:
    """A fault can look at the answer instead."""
    proxy.inject(Fault(does="drop", at=b"DONE", by="server"))
    await client.say(b"it is done")
    assert await client.hear() == b"IT IS "
    assert await client.hear() == b""


async def test_a_black_hole_says_nothing(proxy: Proxy, client: Client, echo: Echo) -> None:
    """In a black hole nothing arrives and nothing ends, until it is healed: then the connection is closed."""
    proxy.inject(Fault(does="black-hole"))
    await client.say(b"lost")
    assert await client.hear_nothing()
    other = Client(proxy)
    await other.say(b"lost too")
    assert await other.hear_nothing()
    assert proxy.connections == 2
    assert echo.heard == b"hello"
    assert not echo.ended.is_set()
    proxy.heal()
    assert await client.hear() == b""
    assert await other.hear() == b""
    other.link.close()


async def test_a_black_hole_may_swallow_only_the_answer(proxy: Proxy, client: Client, echo: Echo) -> None:
    """What brings the black hole about arrives if it is to; its answer does not."""
    proxy.inject(Fault(does="black-hole", at=b"commit", passed=True))
    await client.say(b"commit")
    assert await client.hear_nothing()
    assert echo.heard == b"hellocommit"


async def test_a_delay_holds_bytes_back(proxy: Proxy, client: Client, echo: Echo) -> None:
    """Delayed bytes arrive late and whole."""
    proxy.inject(Fault(does="delay", at=b"slow", seconds=0.3))
    before = anyio.current_time()
    await client.say(b"slow")
    await proxy.struck()
    assert echo.heard == b"hello"
    assert await client.hear() == b"SLOW"
    assert anyio.current_time() - before >= 0.29
    assert proxy.strikes == 1


async def test_a_server_that_is_down_ends_the_connection(proxy: Proxy, client: Client) -> None:
    """Where nobody listens the client's connection just ends."""
    proxy.target = 1
    other = Client(proxy)
    assert await other.hear() == b""
    other.link.close()
