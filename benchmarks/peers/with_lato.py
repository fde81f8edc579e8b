# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with lato."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from lato import Application, Command, Event

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import PUBLISHES, SEND, answer, handlers_for


class Ask(Command):
    number: int


class Told(Event):
    number: int


def sending() -> Loop:
    app = Application("bench")
    app.handler(Ask)(answer)
    return calls(app.execute_async, Ask(number=1))


def publishing(name: str) -> Loop:
    app = Application("bench")
    for handler in handlers_for(name):
        app.handler(Told)(handler)
    return calls(app.publish_async, Told(number=1))


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    yield {SEND: sending(), **{name: publishing(name) for name in PUBLISHES}}
