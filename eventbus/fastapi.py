"""The bus inside a FastAPI application: lifetime, dependency, overrides, health."""

from collections.abc import AsyncGenerator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

try:
    from fastapi import APIRouter, Depends, FastAPI
    from fastapi.requests import HTTPConnection
    from fastapi.responses import JSONResponse
except ModuleNotFoundError as error:
    from eventbus.errors import MissingExtraError

    if error.name is None or error.name.partition(".")[0] != "fastapi":
        raise
    raise MissingExtraError("eventbus.fastapi", "fastapi") from error

from eventbus._extras import load
from eventbus.bus import EventBus
from eventbus.errors import NotRunningError
from eventbus.store import Transaction

if TYPE_CHECKING:
    from eventbus.health import Health

__all__ = ("BusDep", "TransactionDep", "install")

S = TypeVar("S")

_STATE = "eventbus"

Call = Callable[..., Any]


def install(app: FastAPI, bus: EventBus, *, consume: bool = True, health: str | None = None) -> None:
    """Let a bus live as long as an application.

    The bus starts after the application's own lifespan has started and stops before it ends, and so it does with the
    lifespans of routers that were included before. It looks its dependencies up in ``app.dependency_overrides`` first.
    A mounted application is installed too, before the one that it is mounted in: only the outer lifespan runs.

    Args:
        app: the application.
        bus: the bus; one per application.
        consume: False for web processes that only publish, whose workers run elsewhere.
        health: a path such as "/health/bus" that answers 200 or 503 with ``bus.health()`` and what waits in the store.

    Raises ``RuntimeError`` if the application has a bus already, ``WiringError`` if the bus runs already, ``TypeError``
    for arguments that are not an application and a bus, in this order.

    >>> from eventbus import EventBus
    >>> app = FastAPI()
    >>> install(app, EventBus())
    """
    if not (isinstance(app, FastAPI) and isinstance(bus, EventBus)):
        given = f"{type(app).__name__}, {type(bus).__name__}"
        raise TypeError(f"install(app, bus) takes the FastAPI application first and the EventBus second, not ({given})")
    if getattr(app.state, _STATE, None) is not None:
        raise RuntimeError("this application has a bus already: give one EventBus all modules")
    if not isinstance(bus.overrides, _Overrides):
        app.dependency_overrides.update({**bus.overrides, **app.dependency_overrides})
    bus.share_overrides(_Overrides(app))
    setattr(app.state, _STATE, bus)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with bus.running(consume=consume):
            yield

    router = APIRouter(lifespan=lifespan)
    if health is not None:

        @router.get(health, include_in_schema=False)
        async def answer() -> JSONResponse:
            report: Health = await load("eventbus.health:examine")(bus.engine)
            return JSONResponse(report.as_dict(), status_code=200 if report.healthy else 503)

    app.include_router(router)


async def get_bus(connection: HTTPConnection) -> EventBus:
    """Return the bus of the application that serves this request or WebSocket.

    Raises ``NotRunningError`` if none is installed on it.
    """
    bus: Any = getattr(connection.app.state, _STATE, None)
    if isinstance(bus, EventBus):
        return bus
    mounted = "app_root_path" in connection.scope
    raise NotRunningError(
        "BusDep",
        "not installed on this application"
        + (", which is mounted in another: install the bus on it, then on the outer one" if mounted else ""),
    )


BusDep = Annotated[EventBus, Depends(get_bus)]
"""Annotate an endpoint's parameter with it: ``async def create(body: PlaceOrder, bus: BusDep)``."""


async def open_transaction(bus: BusDep) -> AsyncGenerator[Transaction[Any]]:
    """Open a transaction for one request: committed before the response is sent, rolled back if the endpoint fails."""
    async with bus.transaction() as transaction:
        yield transaction


TransactionDep = Annotated[Transaction[S], Depends(open_transaction, scope="function")]
"""Annotate an endpoint's parameter with it: ``async def create(body: NewOrder, tx: TransactionDep[SQLiteSession])``.

A commit that fails is a request that fails. A ``yield`` dependency that takes it must itself say
``Depends(..., scope="function")``.
"""


class _Overrides(MutableMapping[Call, Call]):
    """Be the overrides that an application has now, also after a test has assigned it a new mapping."""

    __slots__ = ("_app",)

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def __getitem__(self, dependency: Call) -> Call:
        return self._app.dependency_overrides[dependency]

    def __setitem__(self, dependency: Call, replacement: Call) -> None:
        self._app.dependency_overrides[dependency] = replacement

    def __delitem__(self, dependency: Call) -> None:
        del self._app.dependency_overrides[dependency]

    def __iter__(self) -> Iterator[Call]:
        return iter(self._app.dependency_overrides)

    def __len__(self) -> int:
        return len(self._app.dependency_overrides)
