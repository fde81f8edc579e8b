"""MariaDB, from Debian's ``mariadb-server``."""

import shutil

from tests.servers.server import AbsentError, Place, Recipe

CURE = "no MariaDB: install Debian's mariadb-server, or name one in EVENTBUS_TEST_MARIADB"


def recipe(*, durable: bool = False) -> Recipe:
    """Return how MariaDB runs; one that is not ``durable`` is quicker, and forgets at a loss of power."""
    install, serve = (shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("mariadb-install-db", "mariadbd"))
    if install is None or serve is None:
        raise AbsentError(CURE)

    def prepare(place: Place) -> list[list[str]]:
        (place.directory / "tmp").mkdir()
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        where = [f"--datadir={place.directory}/data", f"--tmpdir={place.directory}/tmp"]
        return [[install, "--no-defaults", *where, *options]]

    def command(place: Place) -> list[str]:
        here = place.directory
        where = [f"--datadir={here}/data", f"--tmpdir={here}/tmp", f"--socket={here}/s", f"--pid-file={here}/pid"]
        listen = ["--bind-address=127.0.0.1", f"--port={place.port}", "--skip-name-resolve", "--max-connections=300"]
        flush = f"--innodb-flush-log-at-trx-commit={1 if durable else 2}"
        return [serve, "--no-defaults", *where, *listen, flush]

    return Recipe(
        name="mariadb",
        url="mariadb+asyncmy://root@127.0.0.1:{port}/mysql",
        prepare=prepare,
        command=command,
        answer=b"...\x00\x0a",
        unprivileged=True,
    )
