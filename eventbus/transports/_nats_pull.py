"""Take messages from a JetStream consumer: ask for as many as there is credit, and settle in batches.

One subscription of the client stands for the whole life, and what it is to get is asked for by pull requests; nothing
is ever cut. All settlements of one turn of the event loop are sent together, and only the last is answered: the
server works them off in order, so that its answer speaks for all.
"""

import asyncio
import json
import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import anyio

from eventbus.errors import Lost, SettleError
from eventbus.transport import Delivery
from eventbus.transports._nats_line import Answer, Line, is_unheard
from eventbus.transports._nats_pin import GROUP, Pin
from eventbus.transports._nats_wire import Message, dead_head, header, status, to_wire

__all__ = ("Pulled", "Puller", "Source")

LINGER = 10.0
"""Seconds that a pull request waits at the server."""
BEAT = 1.5
"""Seconds between two signs of life of a pull request that waits."""
SILENCE = 3 * BEAT
"""Seconds without any sign after which the consumer counts as lost.

That is all there is when it is deleted just before it is asked: to such a request the server says nothing.
"""
NANO = 1_000_000_000
LONGEST = 9e9
"""Seconds that the server can count in nanoseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Say which consumer of which stream is taken from, and how."""

    stream: str
    consumer: str
    prefetch: int
    lease: float
    pinned: bool = False
    ephemeral: bool = False
    dead: str = ""
    """The subject of the group's dead; none: what is rejected is only dropped."""

    @property
    def name(self) -> str:
        """Return what it is called in errors."""
        return f"consumer {self.consumer!r} of stream {self.stream!r}"


class Pulled:
    """Be one message of a consumer."""

    __slots__ = ("attempt", "place", "puller", "reply", "settled", "until", "wire")

    def __init__(self, puller: "Puller", message: Message, until: float) -> None:
        tokens = message.reply.split(".")
        shift = 0 if len(tokens) == 9 else 2
        self.puller = puller
        self.reply = message.reply
        self.until = until
        self.attempt = int(tokens[4 + shift])
        self.place = int(tokens[5 + shift])
        self.wire = to_wire(message, f"{puller.source.stream}:{self.place}")
        self.settled = False

    async def ack(self) -> None:
        """Settle it as done; returns when the server knows."""
        if self._settle():
            self.puller.forget(self)
            await self.puller.tell(self.reply, b"+ACK")

    async def retry(self, after: float) -> None:
        """Settle it as to come again in ``after`` seconds."""
        if not 0 <= after < math.inf:
            raise ValueError(f"retry() takes the seconds to wait, 0 or more, not {after!r}")
        if self._settle():
            self.puller.forget(self)
            await self.puller.tell(self.reply, _nak(after))

    async def reject(self, reason: str) -> None:
        """Settle it as dead: a copy with the reason is stored first."""
        if self._settle():
            await self.puller.line.run(lambda: self.puller.bury(self, reason))

    async def extend(self) -> None:
        """Keep it for another lease."""
        if not self.settled:
            self._check()
            until = self.puller.line.loop.time() + self.puller.source.lease
            await self.puller.tell(self.reply, b"+WPI")
            self.until = until

    def lapsed(self) -> bool:
        """Tell whether the lease is over, so that the server may have given it to another."""
        return self.puller.line.loop.time() >= self.until

    def _settle(self) -> bool:
        if self.settled:
            return False
        self._check()
        self.settled = True
        return True

    def _check(self) -> None:
        if self.puller.lost:
            raise SettleError(f"{self.puller.lost}, so the message goes to another")
        if self.lapsed():
            self.puller.forget(self)
            raise SettleError(f"its lease of {self.puller.source.lease:g} s is over, so the message goes to another")


class Puller:
    """Be a subscription to one consumer."""

    def __init__(self, line: Line, source: Source) -> None:
        self.line = line
        self.source = source
        self.lost = ""
        self._open: dict[int, Pulled] = {}
        self._buffer: list[Pulled] = []
        self._news = asyncio.Event()
        self._stopping = False
        self._stopped = False
        self._listener: Any = None
        self._ending = asyncio.Lock()
        self._inbox = ""
        self._next = ""
        self._asked = 0
        self._heard = 0.0
        self._pin = Pin(source.lease) if source.pinned else None
        self._ticking = False
        self._verbs: list[tuple[str, bytes, asyncio.Future[str]]] = []

    async def open(self) -> None:
        """Begin to take messages."""
        domain = f"{self.line.address.domain}." if self.line.address.domain else ""
        self._next = f"$JS.{domain}API.CONSUMER.MSG.NEXT.{self.source.stream}.{self.source.consumer}"
        self._inbox = self.line.inbox()
        self._listener = await self.line.listen(f"{self._inbox}.*", self._arrive)
        self.line.pumps.add(self)
        self._tick()

    async def receive(self) -> Delivery:
        """Return the next message."""
        while True:
            while self._buffer and not (self._pin and self._pin.gathering):
                pulled = self._buffer.pop(0)
                if not pulled.lapsed():
                    return pulled
                self.forget(pulled)
            if self.lost:
                raise Lost(self.lost)
            if self._stopped:
                raise anyio.EndOfStream
            self._news.clear()
            await self._news.wait()

    async def stop(self) -> None:
        """Take no more in, and hand back what nobody has received."""
        if not self.lost:
            await self.line.run(self._drain)

    async def close(self) -> None:
        """Hand back everything, and let another be pinned; call it through ``start``."""
        if self.lost:
            return
        await self._drain()
        await self._hand_back([*self._open.values()])
        self.lose("the subscription was left")
        self.line.pumps.discard(self)
        stream, consumer = self.source.stream, self.source.consumer
        if self.source.ephemeral:
            await self.line.api(f"CONSUMER.DELETE.{stream}.{consumer}")
        elif self._pin and self._pin.id:
            await self.line.api(f"CONSUMER.UNPIN.{stream}.{consumer}", {"group": GROUP})

    def lose(self, why: str) -> None:
        """End it; what is unsettled comes back when its lease is over."""
        if self.lost:
            return
        self.lost = why
        self._buffer.clear()
        self._open.clear()
        for _, _, done in self._verbs:
            if not done.done():
                done.set_result(why)
        self._verbs.clear()
        self._news.set()

    def pulse(self, now: float) -> None:
        """Look after pull requests: ask again, stay pinned, and notice when nothing is heard any more."""
        if self._asked and now - self._heard > SILENCE:
            self._lose(f"{self.source.name} has given no sign for {SILENCE:g} s")
        if self._pin:
            self._keep_pin(self._pin, now)
        self._tick()

    def _keep_pin(self, pin: Pin, now: float) -> None:
        ends = [pulled.until for pulled in self._open.values()]
        if pin.lapsed(ends, now):
            self._lose(f"a lease of {self.source.name} has run out, and with it the right to keep its order")
        elif pin.due(ends, now):
            body = {"batch": 1, "no_wait": True, "max_bytes": 1, **pin.terms()}
            self.line.request(self._next, json.dumps(body).encode()).add_done_callback(self._kept_pin)
        if pin.calm(now):
            self._news.set()

    def forget(self, pulled: Pulled) -> None:
        """Count a delivery as unsettled no more."""
        if self._open.get(pulled.place) is pulled:
            del self._open[pulled.place]
        self._wake()

    async def tell(self, reply: str, verb: bytes) -> None:
        """Send a verb together with others of this turn, and wait until the server has it. Raises ``SettleError``."""
        if self.lost:
            raise SettleError(f"{self.lost}, so the message goes to another")
        done: asyncio.Future[str] = self.line.loop.create_future()
        self._verbs.append((reply, verb, done))
        self._wake()
        if why := await done:
            raise SettleError(why)

    async def bury(self, pulled: Pulled, reason: str) -> None:
        """Store a dead copy, then end the message. Raises ``SettleError``, and then it comes back."""
        try:
            if self.source.dead:
                await self._keep_dead(pulled, reason)
        finally:
            self.forget(pulled)
        await self.tell(pulled.reply, b"+TERM")

    async def _keep_dead(self, pulled: Pulled, reason: str) -> None:
        head = dead_head(pulled.wire, f"{self.source.consumer}:{self.source.stream}:{pulled.place}", reason)
        answer = await self.line.request(self.source.dead, pulled.wire.body, head)
        if isinstance(answer, Lost):
            why = str(answer)
        elif is_unheard(answer):
            why = "its stream is gone"
            self._lose(f"the stream that keeps the dead of {self.source.name} is gone")
        elif b'"error"' in answer.data:
            why = answer.data.decode()
        else:
            return
        raise SettleError(
            f"the dead copy on {self.source.dead!r} could not be stored, so the message comes again: {why}"
        )

    def _arrive(self, message: Message) -> None:
        self._heard = self.line.loop.time()
        if not message.reply.startswith("$JS.ACK."):
            self._status(message)
            return
        self._asked = max(self._asked - 1, 0)
        pulled = Pulled(self, message, self._heard + self.source.lease)
        if self._pin:
            self._pin.hear(message, pulled.attempt, self._heard)
        if self.lost:
            self.line.send(pulled.reply, b"-NAK")
            return
        if (before := self._open.get(pulled.place)) is not None:
            before.until = 0.0
        self._open[pulled.place] = pulled
        if self._pin:
            insort(self._buffer, pulled, key=attrgetter("place"))
        else:
            self._buffer.append(pulled)
        self._news.set()
        self._wake()

    def _status(self, message: Message) -> None:
        """Read what the server says about a pull request."""
        code, words = status(message)
        if code == "100":
            return
        left = header(message, "Nats-Pending-Messages") or message.subject.rpartition(".")[2]
        self._asked = max(self._asked - int(left), 0)
        if code == "503" or words in ("Consumer Deleted", "Consumer is push based"):
            self._lose(f"{self.source.name} is gone")
        elif code == "423" and self._pin and self._pin.id:
            self._lose(f"{self.source.name} went to another process")
        elif code == "400":
            self._lose(f"{self.source.name} is not as it should be: {words}")
        elif code == "408":
            self._wake()

    def _lose(self, why: str) -> None:
        self.line.pumps.discard(self)
        self.lose(why)
        self.line.spawn(self._quit)

    async def _quit(self) -> None:
        """Listen no more."""
        listener, self._listener = self._listener, None
        if listener is not None:
            await self.line.hush(listener)

    def _kept_pin(self, coming: "asyncio.Future[Answer]") -> None:
        """Look whether we are pinned still; that there is no message, or none so small, is as it should be."""
        answer = coming.result()
        if not isinstance(answer, Lost) and status(answer)[0] == "423" and not self.lost:
            self._lose(f"{self.source.name} went to another process")

    def _wake(self) -> None:
        if not self._ticking:
            self._ticking = True
            self.line.loop.call_soon(self._tick)

    def _tick(self) -> None:
        """Send what one turn of the event loop has gathered."""
        self._ticking = False
        if self.lost:
            return
        verbs, self._verbs = self._verbs, []
        if verbs:
            for reply, verb, _ in verbs[:-1]:
                self.line.send(reply, verb)
            reply, verb, _ = verbs[-1]
            last = self.line.request(reply, verb)
            last.add_done_callback(lambda answer: self._told(verbs, answer))
        if not self._stopping:
            self._pull()

    def _told(self, verbs: Sequence[tuple[str, bytes, asyncio.Future[str]]], last: "asyncio.Future[Answer]") -> None:
        answer = last.result()
        why = ""
        if isinstance(answer, Lost):
            why = str(answer)
        elif is_unheard(answer):
            why = f"{self.source.name} is gone"
        for _, _, done in verbs:
            if not done.done():
                done.set_result(why)

    def _pull(self) -> None:
        """Ask for as many messages as there is credit, unless enough are asked for."""
        pin, prefetch = self._pin, self.source.prefetch
        taken = 0 if pin and pin.gathering else len(self._open)  # what our predecessor left has to come, all of it
        credit, limit = prefetch - taken - self._asked, 0 if pin and not pin.id else prefetch // 2
        if credit <= 0 or self._asked > limit:
            return
        if not self._asked:
            self._heard = self.line.loop.time()
        self._asked += credit
        body: dict[str, object] = {
            "batch": credit, "expires": int(LINGER * NANO), "idle_heartbeat": int(BEAT * NANO),
        }  # fmt: skip
        if pin:
            body |= pin.terms()
        self.line.send(self._next, json.dumps(body).encode(), reply=f"{self._inbox}.{credit}")

    async def _drain(self) -> None:
        """End the intake at the server, take what was on its way, and hand it back."""
        self._stopping = True
        async with self._ending:
            listener, self._listener = self._listener, None
            if listener is not None:
                await self.line.hush(listener, drain=True)
                self._asked = 0
                await self._hand_back(self._buffer)
            self._stopped = True
            self._news.set()

    async def _hand_back(self, some: Sequence[Pulled]) -> None:
        """Give messages back in their order."""
        done: asyncio.Future[str] | None = None
        for pulled in sorted(some, key=attrgetter("place")):
            if not (pulled.settled or pulled.lapsed()):
                pulled.until = 0.0
                done = self.line.loop.create_future()
                self._verbs.append((pulled.reply, b"-NAK", done))
            self.forget(pulled)
        self._buffer.clear()
        if done is not None:
            self._tick()
            await done


def _nak(after: float) -> bytes:
    if not after:
        return b"-NAK"
    return b'-NAK {"delay": %d}' % math.ceil(min(after, LONGEST) * NANO)
