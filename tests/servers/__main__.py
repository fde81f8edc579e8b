"""Start every server that is installed, print where they are, and end them on Ctrl-C.

python -m tests.servers [NAME ...]
"""

import contextlib
import signal
import sys

from tests.servers import kafka, mariadb, nats, postgres, rabbitmq, valkey
from tests.servers.server import AbsentError, Server

KINDS = {
    "postgres": postgres.recipe, "mariadb": mariadb.recipe, "valkey": valkey.recipe, "nats": nats.recipe,
    "rabbitmq": rabbitmq.recipe, "kafka": kafka.recipe,
}  # fmt: skip


def main(names: list[str]) -> None:
    """Start the named ones, or all, and wait."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as running, contextlib.suppress(KeyboardInterrupt):
        for name in names or KINDS:
            try:
                server = Server(KINDS[name]())
            except AbsentError as error:
                print(f"{name:10} {error}", flush=True)
                continue
            running.callback(server.close)
            server.start()
            print(f"{name:10} {server.url}", flush=True)
        print("Ctrl-C ends them.", flush=True)
        signal.pause()


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(KINDS):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
    main(sys.argv[1:])
