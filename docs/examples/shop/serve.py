"""Serve the shop on this machine: ``make demo``, or ``python docs/examples/shop/serve.py --port 8000``.

A small parent holds the socket and the place of the database, and starts a process that serves. When that one is killed
with -9, and the page has a button for it, the parent starts the next one; those who call meanwhile wait at the socket.
Where ``EVENTBUS_CONFIG`` names a file, such as ``rabbitmq.toml``, another process does the work: ``eventbus worker``.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

HOST = "127.0.0.1"
TRIED = 100
"""Ports that are looked at when the first one is taken."""


def listen(port: int) -> socket.socket:
    """Return a socket on the first free port from ``port`` on; 0 takes any."""
    for candidate in range(port, min(port + TRIED, 65_536)):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, candidate))
            listener.listen()
        except OSError:
            listener.close()
            continue
        return listener
    sys.exit(f"no free port from {port} to {port + TRIED - 1}: name another with --port")


def place(data: Path | None) -> AbstractContextManager[Path | str]:
    """Return the folder for the database: the one that was named, or one that goes when the shop closes."""
    if data is not None:
        return nullcontext(data)
    return tempfile.TemporaryDirectory(prefix="eventbus-shop-", ignore_cleanup_errors=True)


def start(store: str, *command: str, **options: Any) -> subprocess.Popen[str]:
    """Start a process of the shop, which ends when its standard input is closed: it is, however the parent ends."""
    environment = {**os.environ, "SHOP_STORE": store}
    if config := os.environ.get("EVENTBUS_CONFIG"):
        environment |= {"EVENTBUS_CONFIG": str(Path(config).resolve()), "SHOP_WORKER": "another process"}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=Path(__file__).resolve().parents[1],
        env=environment,
        stdin=subprocess.PIPE,
        process_group=0,  # Ctrl+C is for the parent
        text=True,
        **options,
    )


def keep_serving(listener: socket.socket, store: str) -> int:
    """Start a process that serves, and another one whenever it was killed with -9; return how the last one ended."""
    command = ["shop.server", str(listener.fileno())]
    while True:
        with start(store, *command, pass_fds=[listener.fileno()]) as server:
            ended = server.wait()
        if ended != -signal.SIGKILL:
            return ended
        print(f"Process {server.pid} was killed with -9, here is the next one.", flush=True)
        command = [*command[:2], "--again"]


def working(store: str) -> AbstractContextManager[object]:
    """Return the process that works beside the one that serves, if a file says where; not before the file is right."""
    if not os.environ.get("EVENTBUS_CONFIG"):
        return nullcontext()
    with start(store, "eventbus.cli", "check", "--offline", "shop.app:bus", stdout=subprocess.PIPE) as check:
        said, _ = check.communicate()
    if check.returncode:
        sys.exit(said or check.returncode)
    return start(store, "shop.server", "worker")


def leave(_number: int, _frame: object) -> None:
    """End in peace, after the server."""
    sys.exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the example shop.")
    parser.add_argument(
        "--port",
        type=int,
        default=int(os.environ.get("PORT", "8000")),
        help="where to listen; the next free one if it is taken (default: $PORT, or 8000)",
    )
    parser.add_argument("--data", type=Path, help="a folder for shop.db, which stays (default: one that goes)")
    options = parser.parse_args()
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, leave)
    with listen(options.port) as listener, place(options.data) as folder:
        data = Path(folder).resolve()
        data.mkdir(parents=True, exist_ok=True)
        store = f"sqlite:///{quote(str(data / 'shop.db'))}"
        with working(store):
            sys.exit(keep_serving(listener, store))


if __name__ == "__main__":
    main()
