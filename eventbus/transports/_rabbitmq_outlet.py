"""Publish on a channel of its own: what one turn of the event loop brings leaves in one write.

The client library publishes each message in a task and a write of its own, under a lock; that costs more than all the
rest. So the frames are put together here, numbered as the library numbers them, and handed to its writer; it reads the
confirmations and finds whom they concern.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eventbus.clock import new_id
from eventbus.context import EMPTY
from eventbus.errors import Lost, Refused
from eventbus.transport import Wire
from eventbus.transports._rabbitmq_client import Pen
from eventbus.transports._rabbitmq_wire import SHORT, beginning, to_amqp

if TYPE_CHECKING:
    from aiormq import Channel

__all__ = ("Outlet",)


class Call:
    """Be somebody who waits until all of his wires are confirmed, or have failed."""

    __slots__ = ("done", "failed", "left")

    def __init__(self) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed: dict[int, Lost | Refused] = {}
        self.left = 0

    def note(self, index: int, error: Lost | Refused | None) -> None:
        """Note what became of one wire."""
        if error is not None:
            self.failed[index] = error
        self.left -= 1
        if not self.left and not self.done.done():  # whoever is cancelled does not wait any more
            self.done.set_result(None)


class Flight(asyncio.Future[Any]):
    """Be the confirmation of one message that is on its way."""

    call: Call
    index: int
    id: str
    until: float


class Outlet:
    """Send wires until it is over."""

    def __init__(
        self, channel: "Channel", pen: Pen, room: int, timeout: float, explain: Callable[[Exception], Lost | Refused]
    ) -> None:
        self._channel: Any = channel
        self._pen = pen
        self._ids: dict[str, int] = channel.message_id_delivery_tag
        self._room = room
        self._timeout = timeout
        self._explain = explain
        self.late: Callable[[], object]
        """Called when a confirmation is late; calls ``expire``, or ``lose``, in turn."""
        self._loop = asyncio.get_running_loop()
        self._flights: dict[Flight, None] = {}
        """The oldest first."""
        self._timer: asyncio.TimerHandle | None = None
        self._over = ""

    async def send(
        self, exchange: str, key: str, wires: Sequence[Wire], extra: Mapping[str, str | int] = EMPTY
    ) -> dict[int, Lost | Refused]:
        """Return, when all wires are confirmed, those that are not; who is cancelled stops nothing."""
        if self._over:
            return {index: Lost(self._over) for index in range(len(wires))}
        call, until, number = Call(), self._loop.time() + self._timeout, self._channel.number
        for index, wire in enumerate(wires):
            id = wire.id
            try:
                if id in self._ids or not 0 < len(id.encode()) <= SHORT:
                    id = new_id()  # a returned message is known by its id alone
                pieces = [beginning(number, exchange, key), *to_amqp(wire, id, number, self._room, extra)]
            except (Refused, ValueError) as error:
                call.failed[index] = self._explain(error)
            else:
                self._launch(call, index, id, until, pieces)
        if call.left:
            await call.done
        return call.failed

    def _launch(self, call: Call, index: int, id: str, until: float, pieces: Sequence[bytes]) -> None:
        flight = Flight()
        flight.call, flight.index, flight.id, flight.until = call, index, id, until
        flight.add_done_callback(self._landed)
        call.left += 1
        self._flights[flight] = None
        tag = self._channel.delivery_tag = self._channel.delivery_tag + 1
        self._channel.confirmations[tag] = flight
        self._ids[id] = tag
        self._pen.write(pieces)
        if self._timer is None:
            self._timer = self._loop.call_at(until, self._watch)

    def _landed(self, flight: Any) -> None:
        error = flight.exception()
        if flight in self._flights:
            self._end(flight, error and self._explain(error))

    def _end(self, flight: Flight, error: Lost | Refused | None) -> None:
        del self._flights[flight]
        self._ids.pop(flight.id, None)
        flight.call.note(flight.index, error)

    def _watch(self) -> None:
        """Look whether the oldest is late: one timer serves for all that is on its way."""
        if self.is_late():
            self.late()
        else:
            oldest = next(iter(self._flights), None)
            self._timer = None if oldest is None else self._loop.call_at(oldest.until, self._watch)

    def expire(self, why: str) -> None:
        """Wait no more for what is late."""
        now = self._loop.time()
        for flight in [flight for flight in self._flights if flight.until <= now]:
            self._end(flight, Lost(why))
        self._watch()

    def is_late(self) -> bool:
        """Tell whether a confirmation is late."""
        oldest = next(iter(self._flights), None)
        return oldest is not None and oldest.until <= self._loop.time()

    def lose(self, why: str) -> None:
        """Fail every waiter, and everybody who comes."""
        self._over = why
        if self._timer is not None:
            self._timer.cancel()
        for flight in tuple(self._flights):
            self._end(flight, Lost(why))
