# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

"""Do the work with python-cqrs, whose container is left out: it looks handlers up in a dict."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import cqrs

from benchmarks.measure import Loop, calls
from benchmarks.peers.work import PUBLISHES, SEND, answer, handlers_for


class Ask(cqrs.Request):
    number: int


class Told(cqrs.DomainEvent):
    number: int


class Container:
    external_container = None

    def __init__(self) -> None:
        self.handlers = {}

    async def resolve(self, type_):
        return self.handlers[type_]


class Answering(cqrs.RequestHandler[Ask, None]):
    @property
    def events(self):
        return ()

    async def handle(self, request: Ask) -> int:
        return await answer(request)


def sending() -> Loop:
    container, requests = Container(), cqrs.RequestMap()
    container.handlers[Answering] = Answering()
    requests.bind(Ask, Answering)
    return calls(cqrs.RequestMediator(request_map=requests, container=container).send, Ask(number=1))


def publishing(name: str) -> Loop:
    container, events = Container(), cqrs.EventMap()
    for number, take in enumerate(handlers_for(name)):
        kind = type(f"Taking{number}", (cqrs.EventHandler,), {"handle": staticmethod(take)})
        container.handlers[kind] = kind()
        events.bind(Told, kind)
    return calls(cqrs.EventMediator(event_map=events, container=container).send, Told(number=1))


@asynccontextmanager
async def opened() -> AsyncGenerator[dict[str, Loop]]:
    """Yield the loops."""
    yield {SEND: sending(), **{name: publishing(name) for name in PUBLISHES}}
