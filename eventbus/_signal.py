"""Wake whoever waits for something to change."""

import anyio

__all__ = ("Signal",)


class Signal:
    """Wake whoever waits for something to change."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def fire(self) -> None:
        """Wake all who wait now."""
        event, self._event = self._event, None
        if event is not None:
            event.set()

    async def wait(self) -> None:
        """Wait for the next ``fire``."""
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()
