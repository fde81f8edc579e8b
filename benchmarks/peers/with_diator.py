# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with diator, whose container is left out: it looks handlers up in a dict."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from diator.events import DomainEvent, EventEmitter, EventMap
from diator.mediator import Mediator
from diator.requests import Request, RequestMap

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import PUBLISHES, SEND, answer, handlers_for


@dataclass(frozen=True, kw_only=True)
class Ask(Request):
    number: int


@dataclass(frozen=True, kw_only=True)
class Told(DomainEvent):
    number: int


class Handler:
    events = ()

    def __init__(self, handle) -> None:
        self.handle = handle


class Container:
    def __init__(self) -> None:
        self.handlers = {}

    async def resolve(self, type_):
        return self.handlers[type_]


def sending() -> Loop:
    container, requests = Container(), RequestMap()
    container.handlers[Handler] = Handler(answer)
    requests.bind(Ask, Handler)
    return calls(Mediator(request_map=requests, container=container).send, Ask(number=1))


def publishing(name: str) -> Loop:
    container, events = Container(), EventMap()
    for number, handle in enumerate(handlers_for(name)):
        kind = type(f"Handler{number}", (Handler,), {})
        container.handlers[kind] = kind(handle)
        events.bind(Told, kind)
    return calls(EventEmitter(events, container).emit, Told(number=1))


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    yield {SEND: sending(), **{name: publishing(name) for name in PUBLISHES}}
