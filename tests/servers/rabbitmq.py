"""RabbitMQ, from Debian's ``rabbitmq-server``, without its service."""

import shutil

from tests.servers.server import AbsentError, Place, Recipe

SCRIPT = "/usr/lib/rabbitmq/bin/rabbitmq-server"
PATIENCE = "-rabbit dead_letter_worker_publisher_confirm_timeout 2000"
"""Try again after milliseconds, and not three minutes, what came due while exchanges and bindings were not back yet."""

AGE = 2.0
"""Seconds after which also RabbitMQ 3.10 keeps a queue through a kill."""
CURE = "no RabbitMQ: install Debian's rabbitmq-server, or name one in EVENTBUS_TEST_RABBITMQ"


def recipe() -> Recipe:
    """Return how RabbitMQ runs: on three ports, for clients, for nodes and for the daemon that knows the nodes."""
    epmd = shutil.which("epmd")
    if shutil.which(SCRIPT) is None or epmd is None:
        raise AbsentError(CURE)

    def prepare(place: Place) -> list[list[str]]:
        (place.directory / "enabled_plugins").write_text("[].\n")
        (place.directory / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{place.port}\n")
        return []

    def environment(place: Place) -> dict[str, str]:
        here = str(place.directory)
        return {
            "HOME": here,
            "RUNNING_UNDER_SYSTEMD": "true",  # the script then becomes the server, instead of watching over it
            "RABBITMQ_NODENAME": f"eventbus{place.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(place.port),
            "RABBITMQ_DIST_PORT": str(place.port + 1),
            "ERL_EPMD_PORT": str(place.port + 2),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_MNESIA_BASE": f"{here}/mnesia",
            "RABBITMQ_LOG_BASE": f"{here}/log",
            "RABBITMQ_CONFIG_FILE": f"{here}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{here}/enabled_plugins",
            "RABBITMQ_PID_FILE": f"{here}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"-kernel inet_dist_use_interface {{127,0,0,1}} {PATIENCE}",
        }

    return Recipe(
        name="rabbitmq",
        url="amqp://guest:guest@127.0.0.1:{port}/",
        prepare=prepare,
        command=lambda place: [SCRIPT],
        environment=environment,
        farewell=lambda place: [epmd, "-port", str(place.port + 2), "-kill"],
        hello=b"AMQP\x00\x00\x09\x01",
        answer=b"\x01",
        ports=3,
        unprivileged=True,
        patience=120.0,
    )
