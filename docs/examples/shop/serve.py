"""Serve the shop on this machine: ``make demo``, or ``python docs/examples/shop/serve.py --port 8000``."""

import argparse
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])  # started as a file: ``shop`` is the package it lies in

from shop.app import app, bus
from shop.messages import ShopClosed

HOST = "127.0.0.1"
TRIED = 100
"""Ports that are looked at when the first one is taken."""


class Server(uvicorn.Server):
    """End the streams of open pages first: they have no end of their own, and a server waits for its answers."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await bus.publish(ShopClosed())
        await super().shutdown(sockets)


def listen(port: int) -> socket.socket:
    """Return a socket on the first free port from ``port`` on; 0 takes any."""
    for candidate in range(port, min(port + TRIED, 65_536)):
        listener = socket.socket(proto=socket.IPPROTO_TCP)  # named, so that asyncio sends answers without delay
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, candidate))
            listener.listen()
        except OSError:
            listener.close()
            continue
        return listener
    sys.exit(f"no free port from {port} to {port + TRIED - 1}: name another with --port")


def leave(_number: int, _frame: object) -> None:
    """End in peace: uvicorn raises the signal once more when it has shut down."""
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the example shop.")
    parser.add_argument(
        "--port",
        type=int,
        default=int(os.environ.get("PORT", "8000")),
        help="where to listen; the next free one if it is taken (default: $PORT, or 8000)",
    )
    listener = listen(parser.parse_args().port)
    logging.getLogger("eventbus").setLevel(logging.CRITICAL)  # the page shows what fails
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, leave)
    print(bus.explain())
    print(f"\nThe shop is open at http://{HOST}:{listener.getsockname()[1]}/ (Ctrl+C closes it)", flush=True)
    Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listener])


if __name__ == "__main__":
    main()
