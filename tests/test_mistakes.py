"""What goes wrong first: each mistake is on the page that helps, and the page has the words that are really said.

``test_docs.py`` runs the page; here is what needs a server, and that nothing is missing.
"""

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from fastapi import FastAPI
from redis.asyncio import Redis

from eventbus import Event, EventBus, Limits, Lost, Module, Refused
from eventbus.clock import Runtime, SystemClock
from eventbus.fastapi import install
from tests.servers.kafka import PEM, USER
from tests.servers.server import Server
from tests.test_docs import fences
from tests.transports.test_nats_faults import guarded

SECRET = "hunter2"

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "troubleshooting.md"

MISTAKES = {
    "A forgotten `await`",
    "A file with handlers that nobody imports",
    "Two handlers for one command",
    "A dependency that wants a `Request`",
    "Publishing outside a transaction",
    "A wrong URL",
    "An extra that is not installed",
    "A server that is down",
    "A wrong password",
    "An unregistered message",
    "An unknown route",
    "A field that cannot be written",
    "A blocking call in an `async def`",
    "A handler that publishes to itself",
    "Before the start, and after the stop",
    "Two event loops",
    "A fork while the bus runs",
    "`install` the other way round",
    "A mounted application",
    "`TestClient` without `with`",
    "A harness inside a running application",
    "A misspelt option",
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Keep to asyncio, on which the client of Redis runs."""
    return "asyncio"


class Paid(Event, name="t.paid"):
    """State that something was paid."""


class Late(Event, name="t.late"):
    """State that somebody was late."""


def sections() -> dict[str, str]:
    """Return heading -> text of the page's mistakes."""
    _, *parts = re.split(r"(?m)^### (.*)\n", PAGE.read_text())
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_mistake_is_on_the_page() -> None:
    """Every mistake has a section that ends in what is said, on less than a screen."""
    assert sections().keys() == MISTAKES
    said = [block for block in fences(PAGE) if block.language == "text"]
    assert len(said) == len(MISTAKES)
    assert all(0 < len(block.text.splitlines()) <= 10 for block in said)


@asynccontextmanager
async def strangers(broker: str, request: pytest.FixtureRequest) -> AsyncGenerator[str]:
    """Yield the URL of a broker, with a password that it does not know."""
    if broker == "nats":
        async with guarded(request.getfixturevalue("absent"), "--user", "shop", "--pass", "right") as server:
            yield f"nats://shop:{SECRET}@127.0.0.1:{server.port}"
        return
    server = request.getfixturevalue(broker)
    if broker == "kafka":
        if server.foreign:
            pytest.skip("the users of a Kafka of somebody else are not known")
        yield f"kafka+ssl://{USER}:{SECRET}@127.0.0.1:{server.port + 2}?cafile={server.place.directory / PEM}"
    else:
        scheme, _, place = server.url.partition("://")
        yield f"{scheme}://shop:{SECRET}@{place.rpartition('@')[2]}"


def carrying(url: str, limits: Limits | None = None) -> EventBus:
    """Return a bus with a route to a broker."""
    module = Module("m", messages=[Paid])
    return EventBus(module, name="m", transports={"events": url}, routes={Paid: "events"}, limits=limits)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("broker", ["valkey", "nats", "rabbitmq", "kafka"])
async def test_wrong_password(broker: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong password ends the start, whichever the broker, in the words of the page, and is not shown."""
    async with strangers(broker, request) as url:
        bus = carrying(url)
        with pytest.raises(Refused) as caught:
            async with bus.running():
                pass
    (words,) = re.findall(r"```text\n(.*)\n```", sections()["A wrong password"])
    really = re.sub(r":\d+/", ":6379/", f"Refused: {caught.value}")
    before, _, why = words.partition("redis://")
    assert really.startswith(before)
    assert really.endswith(why.rpartition("; ")[2])
    assert broker != "valkey" or really == words
    assert SECRET not in f"{caplog.text} {caught.value!r} {caught.value.__cause__!r}"


async def test_password_that_is_changed_while_the_bus_runs(valkey: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Who is not let in any more has lost its broker: health is red, publishing is Lost, until the password is back."""

    async def become(state: bool) -> None:
        with anyio.fail_after(20):
            while bus.health().healthy is not state:  # noqa: ASYNC110 - a link in trouble tells nobody
                await anyio.sleep(0.02)

    client = Redis.from_url(valkey.url)
    user = ("ACL", "SETUSER", "tom", "reset", "on", "~*", "+@all")
    await client.execute_command(*user, ">first")
    bus = carrying(valkey.url.replace("redis://", "redis://tom:first@"), Limits(connect=0.2))
    async with bus.running():
        await bus.publish(Paid(), atomic=False)
        await client.execute_command(*user, ">second")
        await client.execute_command("CLIENT", "KILL", "USER", "tom")
        with pytest.raises(Lost):  # which finds out
            await bus.publish(Paid(), atomic=False)
        await become(False)
        with pytest.raises(Lost, match="has not been reachable"):
            await bus.publish(Paid(), atomic=False)
        assert bus.health().faults == ("transport events is not open",)
        assert "does not let us in" in caplog.text
        await client.execute_command(*user, ">first")
        await become(True)
        await bus.publish(Paid(), atomic=False)
    await client.aclose()
    assert "first" not in caplog.text


class Stalling(SystemClock):
    """Be the time of a process whose event loop somebody holds up."""

    held = 0.0

    def monotonic(self) -> float:
        """Return the time with what was held up."""
        return super().monotonic() + self.held


async def test_blocked_event_loop_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """An event loop that stands still is counted each time, and told with who was at work, each once a minute."""
    clock, module = Stalling(), Module("m", messages=[Paid])

    @module.on(Paid)
    async def block(event: Paid) -> None:
        clock.held += 62.0 if held_by == "the same, after a minute" else 2.0

    @module.on(Late)
    async def innocent(event: Late) -> None: ...

    bus = EventBus(module, routes={"t.*": "memory"})
    with bus.rewired(Runtime(clock)):
        async with bus.running():
            who = ["a handler", "the same", "an endpoint", "the same, after a minute"]
            for stalls, held_by in enumerate(who, start=1):
                if held_by == "an endpoint":
                    clock.held += 2.0
                else:
                    await bus.publish(Paid())
                with anyio.fail_after(10):
                    while bus.health().stalls < stalls:  # noqa: ASYNC110 - who looks tells nobody
                        await anyio.sleep(0.02)
    told = [record.getMessage() for record in caplog.records if "stood still" in record.getMessage()]
    assert [text.partition("at work: ")[2].partition(";")[0] for text in told] == [
        "bus/m.block", "an endpoint, or a handler without a route", "bus/m.block"
    ]  # fmt: skip


def test_install_the_other_way_round() -> None:
    """Swapped arguments are told which comes first."""
    with pytest.raises(TypeError) as caught:
        install(EventBus(), FastAPI())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    (words,) = re.findall(r"```text output\n(.*)\n```", sections()["`install` the other way round"])
    assert words == f"TypeError: {caught.value}"
