"""Listen to a subject of core NATS: what arrives is there once, and nobody settles it."""

from typing import Any

from eventbus._mailbox import Mailbox, Presettled
from eventbus.clock import new_id
from eventbus.errors import Lost
from eventbus.transports._nats_line import Line
from eventbus.transports._nats_wire import Message, to_wire

__all__ = ("Listener",)


class Listener(Mailbox):
    """Be a subscription to a subject."""

    def __init__(self, line: Line, subject: str, limit: int) -> None:
        super().__init__(limit)
        self._line = line
        self._subject = subject
        self._listener: Any = None

    async def open(self) -> None:
        """Begin to listen; returns when the server knows, so that nothing published after it is missed."""
        self._listener = await self._line.listen(self._subject, self._arrive)
        self._line.pumps.add(self)
        echo = await self._line.request(self._line.inbox(), b"")
        if isinstance(echo, Lost):
            await self.close()
            raise echo

    async def stop(self) -> None:
        """Take no more in."""
        await super().stop()
        await self.close()

    async def close(self) -> None:
        """Listen no more."""
        self._line.pumps.discard(self)
        listener, self._listener = self._listener, None
        if listener is not None and not self._line.lost:
            await self._line.run(lambda: self._line.hush(listener))

    def pulse(self, now: float) -> None:
        """Do nothing: the line itself notices its end."""

    def _arrive(self, message: Message) -> None:
        self.put(Presettled(to_wire(message, new_id())))
