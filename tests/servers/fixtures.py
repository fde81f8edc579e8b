"""The fixtures: one server of each kind for the session, and a database for one test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest

from tests.servers import kafka as kafka_recipe
from tests.servers import mariadb as mariadb_recipe
from tests.servers import nats as nats_recipe
from tests.servers import postgres as postgres_recipe
from tests.servers import rabbitmq as rabbitmq_recipe
from tests.servers import valkey as valkey_recipe
from tests.servers.databases import database
from tests.servers.server import AbsentError, Recipe, Server

Absent = Callable[[str], NoReturn]


@contextmanager
def provide(make: Callable[[], Recipe], absent: Absent) -> Iterator[Server]:
    """Start a server, end it behind the tests; an absent one is the business of ``absent``."""
    try:
        server = Server(make())
    except AbsentError as error:
        absent(str(error))
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def postgres(absent: Absent) -> Iterator[Server]:
    """Return a PostgreSQL that is quick; killed, it forgets."""
    with provide(postgres_recipe.recipe, absent) as server:
        yield server


@pytest.fixture(scope="session")
def durable_postgres(absent: Absent) -> Iterator[Server]:
    """Return a PostgreSQL that keeps what it has confirmed."""
    with provide(lambda: postgres_recipe.recipe(durable=True), absent) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb(absent: Absent) -> Iterator[Server]:
    """Return a MariaDB that is quick; killed, it keeps what it has confirmed."""
    with provide(mariadb_recipe.recipe, absent) as server:
        yield server


@pytest.fixture(scope="session")
def durable_mariadb(absent: Absent) -> Iterator[Server]:
    """Return a MariaDB that keeps what it has confirmed."""
    with provide(lambda: mariadb_recipe.recipe(durable=True), absent) as server:
        yield server


@pytest.fixture(scope="session")
def valkey(absent: Absent) -> Iterator[Server]:
    """Return a Valkey, or the Redis that EVENTBUS_TEST_REDIS names."""
    with provide(valkey_recipe.recipe, absent) as server:
        yield server


@pytest.fixture(scope="session")
def nats(absent: Absent) -> Iterator[Server]:
    """Return a NATS server with JetStream."""
    with provide(nats_recipe.recipe, absent) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq(absent: Absent) -> Iterator[Server]:
    """Return a RabbitMQ."""
    with provide(rabbitmq_recipe.recipe, absent) as server:
        yield server


@pytest.fixture(scope="session")
def kafka(absent: Absent) -> Iterator[Server]:
    """Return an Apache Kafka of one node."""
    with provide(kafka_recipe.recipe, absent) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Server) -> Iterator[str]:
    """Return the URL of an empty PostgreSQL database."""
    with database(postgres) as url:
        yield url


@pytest.fixture
def mariadb_url(mariadb: Server) -> Iterator[str]:
    """Return the URL of an empty MariaDB database."""
    with database(mariadb) as url:
        yield url
