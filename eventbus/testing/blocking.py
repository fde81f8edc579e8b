"""Drive a harness from a test that is not async: in an event loop of its own, in another thread."""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from eventbus._extras import require
from eventbus.context import Receipt
from eventbus.message import Command
from eventbus.store import DeadEntry
from eventbus.testing.harness import Harness
from eventbus.testing.record import Seen
from eventbus.testing.standins import Stub

if TYPE_CHECKING:
    from starlette.testclient import TestClient

__all__ = ("BlockingHarness", "blocking")

R = TypeVar("R")
M = TypeVar("M")


class BlockingHarness:
    """Be a harness without ``await``; made by ``blocking``."""

    def __init__(self, harness: Harness, portal: BlockingPortal) -> None:
        self.harness = harness
        """The harness itself; whatever is async in it goes through ``portal.call``."""
        self.portal = portal
        """Anyio's portal into the event loop of the bus."""
        self._client: TestClient | None = None

    @property
    def client(self) -> "TestClient":
        """Starlette's TestClient on the application, in the event loop of the bus. Raises ``RuntimeError``."""
        if self._client is None:
            library = require("starlette.testclient", extra="testing", what="blocking(harness(app=...))")
            client: TestClient = library.TestClient(self.harness.served)
            client.portal = self.portal
            self._client = client
        return self._client

    def send(self, command: Command[R]) -> R:
        """Send a command and return its result."""
        return self.portal.call(self.harness.send, command)

    def publish(
        self,
        event: object,
        /,
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
        atomic: bool = False,
    ) -> Receipt:
        """Publish an event."""
        call = partial(self.harness.publish, event, key=key, delay=delay, headers=headers, atomic=atomic)
        return self.portal.call(call)

    def enqueue(
        self,
        command: Command[Any],
        /,
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
        atomic: bool = False,
    ) -> Receipt:
        """Enqueue a command."""
        call = partial(self.harness.enqueue, command, key=key, delay=delay, headers=headers, atomic=atomic)
        return self.portal.call(call)

    def settled(self) -> None:
        """Return when nothing runs and nothing is due at the current virtual time."""
        self.portal.call(self.harness.settled)

    def advance(self, seconds: float) -> None:
        """Move the clock, stopping at every due time on the way, and settle at each."""
        self.portal.call(self.harness.advance, seconds)

    def published(self, type: type[M], /, **facts: Any) -> Seen[M]:
        """Return the published events of a type whose fields have these values."""
        return self.harness.published(type, **facts)

    def sent(self, type: type[M], /, **facts: Any) -> Seen[M]:
        """Return the handled commands of a type whose fields have these values."""
        return self.harness.sent(type, **facts)

    def handled(self, handler: str | Callable[..., Any]) -> Seen[Any]:
        """Return the messages that a handler handled without an error."""
        return self.harness.handled(handler)

    def failed(self, handler: str | Callable[..., Any]) -> list[Exception]:
        """Return what a handler raised; looking at a failure is observing it."""
        return self.harness.failed(handler)

    @property
    def dead(self) -> list[DeadEntry]:
        """The dead as of the last ``settled`` or ``advance``; looking is observing."""
        return self.harness.dead

    def stub(self, handler: str | Callable[..., Any], **answers: Any) -> Stub:
        """Let something else stand in for a handler, as ``Harness.stub`` says."""
        return self.harness.stub(handler, **answers)


@contextmanager
def blocking(opening: AbstractAsyncContextManager[Harness], *, backend: str = "asyncio") -> Generator[BlockingHarness]:
    """Open a harness for a test that is not async; ``t.client`` is Starlette's TestClient, not to be entered.

    Args:
        opening: what ``harness(...)`` returned.
        backend: the event loop that runs in the other thread, "asyncio" or "trio".

    >>> from eventbus import EventBus
    >>> from eventbus.testing import harness
    >>> with blocking(harness(EventBus())) as t:
    ...     t.settled()
    """
    with start_blocking_portal(backend) as portal, portal.wrap_async_context_manager(opening) as harness:
        yield BlockingHarness(harness, portal)
