# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with blinker, which awaits the receivers of a signal one after another."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from blinker import Signal

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import PUBLISHES, handlers_for


def publishing(name: str) -> Loop:
    signal = Signal()
    for handler in handlers_for(name):
        signal.connect(handler, weak=False)
    return calls(signal.send_async, object())


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    yield {name: publishing(name) for name in PUBLISHES}
