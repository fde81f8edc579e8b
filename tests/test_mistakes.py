"""What goes wrong first: each mistake is on the page that helps, and the page has the words that are really said.

``test_docs.py`` runs the page; here is what needs a server, and that nothing is missing.
"""

import re
from pathlib import Path

import anyio
import pytest

from eventbus import Event, EventBus, Module
from tests.servers.server import Server
from tests.test_docs import fences

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


async def test_wrong_password(valkey: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong password is told in the words of the page, keeps the health red, and is not shown."""
    module = Module("m", messages=[Paid])
    url = valkey.url.replace("redis://", "redis://shop:hunter2@")
    bus = EventBus(module, name="m", transports={"events": url}, routes={Paid: "events"})
    async with bus.running():
        await anyio.lowlevel.checkpoint()
        assert "transport events is not open" in bus.health().faults
    (words,) = re.findall(r"```text\n(.*)\n```", sections()["A wrong password"])
    really = re.sub(r":\d+/", ":6379/", caplog.text)
    assert words in really
    assert "hunter2" not in caplog.text
