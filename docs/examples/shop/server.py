"""Be the process that serves the shop, on a socket that its parent holds, or the one that works: see ``serve.py``."""

import logging
import os
import signal
import socket
import sys
import threading

import uvicorn

from eventbus import cli
from shop.app import app, bus
from shop.messages import ShopClosed


class Server(uvicorn.Server):
    """Say when the shop is open, and end the streams of open pages before everything else."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()
            print(f"The shop is open at http://{host}:{port}/ (Ctrl+C closes it)", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await bus.publish(ShopClosed())  # a stream has no end of its own, and a server waits for its answers
        await super().shutdown(sockets)


def follow_parent() -> None:
    """End when the parent does, or when it asks to: either closes our standard input."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def leave(_number: int, _frame: object) -> None:
    """End in peace: uvicorn raises the signal once more when it has shut down."""
    sys.exit(0)


def main(what: str, *options: str) -> None:
    """Serve on the socket of this number, or be the worker."""
    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=follow_parent, daemon=True).start()
    if what == "worker":
        logging.basicConfig(level=logging.WARNING)
        cli.main(["worker", "shop.app:app"])
    logging.getLogger("eventbus").setLevel(logging.CRITICAL)  # the page shows what fails
    if "--again" not in options:
        print(bus.explain(), end="\n\n")
    # the protocol is named, so that asyncio sends answers without delay
    listener = socket.socket(proto=socket.IPPROTO_TCP, fileno=int(what))
    Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
