"""Say what every library is asked to do: the same work, by the same handlers."""

from asyncio import sleep
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ("DIRECT", "FORGET", "PUBLISHES", "SEND", "WORKS", "Handler", "answer", "handlers_for")

Handler = Callable[[Any], Awaitable[Any]]

SEND = "send"
FORGET = "publish unawaited"
"""Publish to one handler without waiting for it, so many times, and only then until all are handled."""
PUBLISHES = {"to 3": (3, False), "to 10": (10, False), "to 10 that suspend": (10, True)}
"""Publish and wait -> for how many handlers, and whether each gives way to the event loop once."""
WORKS = (SEND, *PUBLISHES, FORGET)
DIRECT = "plain Python"


async def answer(_: object) -> int:
    return 1


def handlers_for(publish: str) -> list[Handler]:
    """Return the handlers of one publish, each a function of its own."""
    count, suspending = PUBLISHES[publish]
    return [_suspends() if suspending else _is_quiet() for _ in range(count)]


def _is_quiet() -> Handler:
    async def take(_: object) -> None:
        pass

    return take


def _suspends() -> Handler:
    async def take(_: object) -> None:
        await sleep(0)

    return take
