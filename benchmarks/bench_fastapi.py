"""Measure an endpoint that sends a command, beside the same endpoint that awaits the function itself."""

from collections.abc import MutableMapping, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.requests import HTTPConnection

from benchmarks.measure import Effort, Loop, Row, calls, race
from eventbus import Command, EventBus, Module
from eventbus.fastapi import BusDep, install

__all__ = ("rows",)

Message = MutableMapping[str, Any]


class Ask(Command[int], name="bench.ask"):
    number: int


async def answer(cmd: Ask) -> int:
    return cmd.number


async def nothing(_: HTTPConnection) -> None:
    """Cost what FastAPI takes for any dependency."""


def make_app() -> FastAPI:
    module = Module("bench")
    module.handles(Ask)(answer)
    bus, app = EventBus(module), FastAPI()
    install(app, bus)

    @app.post("/function")
    async def through_function(body: Ask) -> int:
        return await answer(body)

    @app.post("/dependency")
    async def through_dependency(body: Ask, _: Annotated[None, Depends(nothing)]) -> int:
        return await answer(body)

    @app.post("/bus")
    async def through_bus(body: Ask, bus: BusDep) -> int:
        return await bus.send(body)

    @app.post("/held")
    async def through_held_bus(body: Ask) -> int:
        return await bus.send(body)

    return app


def requests(app: FastAPI, path: str) -> Loop:
    """Return the loop that makes requests by plain ASGI calls, as a server would."""
    body = b'{"number":1}'
    request: Message = {"type": "http.request", "body": body, "more_body": False}
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    template = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip

    async def receive() -> Message:
        return request

    async def send(message: Message) -> None:
        if message.get("status", 200) != 200:
            raise RuntimeError(f"{path} answered {message['status']}")

    async def ask() -> None:
        await app({**template, "state": {}}, receive, send)

    return calls(ask)


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons."""
    app = make_app()
    took = await race(effort, {path: requests(app, f"/{path}") for path in ("function", "dependency", "bus", "held")})
    function, depending = "await handler(body)", "await handler(body), with an empty dependency"
    return [
        Row("requests, send on a bus in a global", took["held"], function, took["function"], unit="/s"),
        Row("requests, send on a BusDep", took["bus"], depending, took["dependency"], unit="/s"),
        Row("requests, send on a BusDep", took["bus"], function, took["function"], unit="/s"),
    ]
