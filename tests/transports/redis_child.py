"""Consume from Redis until somebody kills this process.

python -m tests.transports.redis_child URL DIRECTORY

``started.txt`` gets the number of every message whose handler starts, ``done.txt`` that of every one that ended.
"""

import sys
from pathlib import Path

import anyio

from eventbus import Event, EventBus, Limits, Module

SLOTS = 4
LIMITS = Limits(lease=1.5, concurrency=SLOTS)


class Made(Event, name="kill.made"):
    """State that something was made."""

    number: int


def make(url: str, directory: Path, pause: float) -> EventBus:
    """Return a bus whose handler takes ``pause`` seconds."""
    module = Module("kill")

    @module.on(Made)
    async def note(event: Made) -> None:
        for name in ("started", "done"):
            with (directory / f"{name}.txt").open("a") as file:
                file.write(f"{event.number}\n")
            await anyio.sleep(pause if name == "started" else 0)

    return EventBus(module, name="kill", transports={"events": url}, routes={Made: "events"}, limits=LIMITS)


async def main(url: str, directory: str) -> None:
    """Run until the end."""
    async with make(url, Path(directory), 0.02).running():
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
