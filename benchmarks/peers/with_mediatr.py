# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with mediatr, which sends and does not publish."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from mediatr import Mediator
from pydantic import BaseModel

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import SEND


class Ask(BaseModel):
    number: int


@Mediator.handler
async def handle(_: Ask) -> int:
    return 1


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    yield {SEND: calls(Mediator().send_async, Ask(number=1))}
