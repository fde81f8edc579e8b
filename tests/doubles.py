"""Stand-ins that tests share: a delivery that notes what becomes of it, and a transport that fails on command."""

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self

import anyio

from eventbus.errors import Lost, PublishError, SettleError
from eventbus.transport import Capabilities, Delivery, Subscription, Wire


class Letter:
    """Be a delivery by itself; ``verbs`` has what was done to it."""

    def __init__(self, id: str = "1", key: str | None = None, body: bytes = b"{}", attempt: int = 1) -> None:
        self.wire = Wire(id, body, {}, key)
        self.attempt = attempt
        self.verbs: list[Any] = []

    async def ack(self) -> None:
        """Note it."""
        self.verbs.append("ack")

    async def retry(self, after: float) -> None:
        """Note it."""
        self.verbs.append(("retry", after))

    async def reject(self, reason: str) -> None:
        """Note it."""
        self.verbs.append(("reject", reason))

    async def extend(self) -> None:
        """Note it."""
        self.verbs.append("extend")

    def __repr__(self) -> str:
        return f"Letter({self.wire.id!r}, {self.wire.key!r})"


Trouble = Callable[[int], Exception | None]
"""Number of the call, from 1 -> what it raises."""


def at(*numbers: int, error: Callable[[], Exception] = lambda: Lost("cut")) -> Trouble:
    """Fail at the calls of these numbers."""
    return lambda number: error() if number in numbers else None


class Flaky:
    """Be a transport in memory that outlives its links, and fails when it is told to.

    ``trouble`` maps "open", "declare", "subscribe", "receive", "publish", "settle", "extend", "stop" or "close" to
    what the n-th call of it raises. ``calls`` counts them, ``log`` has every settling and every publish.
    """

    def __init__(self, **promises: Any) -> None:
        self.capabilities = Capabilities(
            **{
                "confirm": "stored", "unheard": "kept", "groups": True, "broadcast": True, "returns": "link",
                "settle": "each", "attempts": True, "retry": 0.0, "grain": 0.001, "dead": True, "order": "exclusive",
                "headers": True, "max_bytes": 1_000_000, "backends": frozenset({"asyncio", "trio"}), **promises,
            }
        )  # fmt: skip
        self.trouble: dict[str, Trouble] = {}
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[Any, ...]] = []
        self.topics: dict[str, set[str]] = {}
        self.ordered: set[tuple[str, str]] = set()
        self.queues: dict[tuple[str, str], deque[tuple[Wire, int]]] = {}
        self.open = 0
        self.subscriptions: list[Line] = []
        self.late: list[Wire] = []
        """What still comes out of a subscription after its stop."""
        self.hooks: dict[str, Callable[[], Any]] = {}

    async def step(self, name: str) -> None:
        """Count a call, let a hook run, and fail if told to."""
        self.calls[name] += 1
        if name in self.hooks:
            await self.hooks[name]()
        trouble = self.trouble.get(name)
        error = trouble(self.calls[name]) if trouble else None
        if error is not None:
            raise error

    async def __aenter__(self) -> Self:
        await self.step("open")
        self.open += 1
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.open -= 1
        for line in [*self.subscriptions]:
            line.lose("the link was closed")
        await self.step("close")

    async def declare(self, topic: str, groups: Sequence[str], *, ordered: Collection[str] = ()) -> None:
        """Remember groups and make their queues."""
        await self.step("declare")
        self.ordered.update((topic, group) for group in ordered)
        self.topics.setdefault(topic, set()).update(groups)
        for group in groups:
            self.queues.setdefault((topic, group), deque())

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Put wires into every queue of a topic."""
        try:
            await self.step("publish")
        except Lost as error:
            raise PublishError(dict.fromkeys(range(len(wires)), error)) from error
        for wire in wires:
            self.log.append(("publish", topic, wire.id))
            for group in sorted(self.topics.get(topic, ())):
                self.queues[topic, group].append((wire, 0))
        self.tell()

    @asynccontextmanager
    async def subscribe(
        self, topic: str, *, group: str | None, prefetch: int, lease: float, ordered: bool = False
    ) -> AsyncIterator[Subscription]:
        """Subscribe; what is unsettled at the end goes back to the front."""
        await self.step("subscribe")
        assert group is not None
        line = Line(self, topic, group, prefetch)
        self.subscriptions.append(line)
        try:
            yield line
        finally:
            line.lose("the subscription was left")

    def lose(self, why: str = "the link broke") -> None:
        """Break every open subscription."""
        for line in [*self.subscriptions]:
            line.lose(why)

    def tell(self) -> None:
        """Let every subscription look again."""
        for line in self.subscriptions:
            line.news.set()

    def outstanding(self) -> int:
        """Count what is queued or unsettled."""
        return sum(map(len, self.queues.values())) + sum(len(line.unsettled) for line in self.subscriptions)

    def settled(self, verb: str) -> list[str]:
        """Return the ids settled by a verb, in order."""
        return [entry[2] for entry in self.log if entry[0] == verb]


class Line:
    """Be one subscription of a flaky transport."""

    def __init__(self, transport: Flaky, topic: str, group: str, prefetch: int) -> None:
        self.transport = transport
        self.queue = transport.queues.setdefault((topic, group), deque())
        self.group = group
        self.prefetch = prefetch
        self.unsettled: list[Parcel] = []
        self.news = anyio.Event()
        self.lost = ""
        self.stopped = False

    async def receive(self) -> Delivery:
        """Return the next delivery."""
        while True:
            await self.transport.step("receive")
            if self.lost:
                raise Lost(self.lost)
            if self.stopped and not self.transport.late:
                raise anyio.EndOfStream
            if self.stopped:
                self.queue.append((self.transport.late.pop(0), 0))
            if self.queue and len(self.unsettled) < self.prefetch:
                parcel = Parcel(self, *self.queue.popleft())
                self.unsettled.append(parcel)
                return parcel
            self.news = anyio.Event()
            await self.news.wait()
            self.transport.calls["receive"] -= 1

    async def stop(self) -> None:
        """Take nothing more in."""
        await self.transport.step("stop")
        self.stopped = True
        self.news.set()

    def lose(self, why: str) -> None:
        """Break; what is unsettled goes back."""
        if self in self.transport.subscriptions:
            self.transport.subscriptions.remove(self)
            self.lost = why
            self.queue.extendleft((parcel.wire, parcel.attempt) for parcel in reversed(self.unsettled))
            self.unsettled.clear()
            self.news.set()


class Parcel:
    """Be one delivery of a flaky transport."""

    def __init__(self, line: Line, wire: Wire, attempts: int) -> None:
        self.line = line
        self.wire = wire
        self.attempt = attempts + 1

    async def ack(self) -> None:
        """Settle it as done."""
        await self._settle("ack")

    async def retry(self, after: float) -> None:
        """Put it back: at the front for 0, else at the end once the delay is over (this one knows none)."""
        await self._settle("retry", after)
        if after:
            self.line.queue.append((self.wire, self.attempt))
        else:
            self.line.queue.appendleft((self.wire, self.attempt))
        self.line.transport.tell()

    async def reject(self, reason: str) -> None:
        """Settle it as dead."""
        await self._settle("reject", reason)

    async def extend(self) -> None:
        """Note that it was extended."""
        await self.line.transport.step("extend")
        self.line.transport.log.append(("extend", self.line.group, self.wire.id))

    async def _settle(self, verb: str, *facts: Any) -> None:
        await self.line.transport.step("settle")
        if self not in self.line.unsettled:
            raise SettleError("it went back")
        self.line.unsettled.remove(self)
        self.line.transport.log.append((verb, self.line.group, self.wire.id, *facts))
        self.line.news.set()


@contextmanager
def raised(kind: type[BaseException]) -> Iterator[list[BaseException]]:
    """Collect what a block raises, which must be exactly of a kind and in no group."""
    caught = list[BaseException]()
    try:
        yield caught
    except BaseException as error:
        if type(error) is not kind:
            raise
        caught.append(error)
    else:
        raise AssertionError(f"nothing was raised, where a {kind.__name__} was due")
