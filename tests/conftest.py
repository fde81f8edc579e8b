"""Set up what every test shares: both backends, Hypothesis, and the rule for things that are absent."""

import os
import re
import shutil
from collections.abc import Callable
from typing import NoReturn

import pytest
from hypothesis import settings

pytest_plugins = ["tests.servers.fixtures"]

IN_CI = os.environ.get("CI", "").lower() not in {"", "0", "false"}

settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None, max_examples=300)
settings.load_profile("ci" if IN_CI else "dev")


LONG = re.compile(
    r"servers/|transports/test_(kafka|rabbitmq|nats|redis_bus)"
    r"|stores/.*(asyncpg|asyncmy|sync psycopg)|test_model_of_sqlalchemy"
    r"|crash/|stores/test_model|stores/test_sqlite_processes|reliability/test_fuzz|simulation/test_found"
    r"|test_mended_passes|test_many_tests_one_after_another|test_same_seed|test_oracle_sees|test_pytest_plugin"
    r"|test_cli|test_a_handler_is_not_given|test_timeout_is_not_spent|test_deep_text"
    r"|transports/.*exam(.*(34|44) |_of_the_broker)|transports/test_redis\.py::test_(?!exam)"
    r"|transports/test_redis\.py::test_exam_of_(channels|streams\[(14|2[0-6]|35|45) )"
    r"|transports/test_postgres\.py::test_exam"
    r"|test_docs\.py::test_python_runs\[docs/(?!tutorial/[123])|test_rehearsal"
    r"|stores/test_sqlalchemy.*aiosqlite|test_killed_in_the_middle|test_same_shop|test_data_stays_where"
    r"|test_rounds_of_start|test_same_in_every|test_every_value_is_read|test_member_is_verbatim|test_guide_transport"
    r"|in_a_circle_through_queues|test_a_store_that_was_away|reliability/test_canary|test_next_port_is_taken"
    r"|test_whose_t|test_lease_is_kept_while|test_blocked_event_loop_is_told|test_deadlock"
    r"|typing/|testing/test_record"
)
"""What takes its time, or a server that is no wheel: marked ``long``, so that the rest is done in a few minutes."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is long."""
    for item in items:
        if LONG.search(item.nodeid):
            item.add_marker(pytest.mark.long)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options of this suite."""
    parser.addoption(
        "--kills",
        type=int,
        default=int(os.environ.get("EVENTBUS_KILLS", "10")),
        help="how many child processes each crash test kills (default: $EVENTBUS_KILLS, or 10)",
    )
    parser.addoption(
        "--drains",
        type=int,
        default=int(os.environ.get("EVENTBUS_DRAINS", "3")),
        help="how often a loaded worker is drained (default: $EVENTBUS_DRAINS, or 3)",
    )
    parser.addoption(
        "--touches",
        type=int,
        default=int(os.environ.get("EVENTBUS_TOUCHES", "3")),
        help="how often a server is reloaded, and one of four workers killed (default: $EVENTBUS_TOUCHES, or 3)",
    )
    parser.addoption("--seed", type=int, default=None, help="play this seed of the simulation and no other")
    parser.addoption(
        "--seeds",
        type=int,
        default=500 if IN_CI else 50,
        help="how many seeds of the simulation to play (default: 500 in CI, 50 at home)",
    )
    parser.addoption(
        "--messages",
        type=int,
        default=int(os.environ.get("EVENTBUS_MESSAGES", "1000")),
        help="how many messages go through a broker that is restarted (default: $EVENTBUS_MESSAGES, or 1000)",
    )


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run every async test on both backends; override it in a module that cannot."""
    return request.param


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """Return how many child processes a crash test kills."""
    return request.config.getoption("--kills")


@pytest.fixture(scope="session")
def drains(request: pytest.FixtureRequest) -> int:
    """Return how often a loaded worker is drained."""
    return request.config.getoption("--drains")


@pytest.fixture(scope="session")
def touches(request: pytest.FixtureRequest) -> int:
    """Return how often a server is reloaded, and one of four workers killed."""
    return request.config.getoption("--touches")


@pytest.fixture(scope="session")
def messages(request: pytest.FixtureRequest) -> int:
    """Return how many messages go through a broker that is restarted."""
    return request.config.getoption("--messages")


@pytest.fixture(scope="session")
def absent() -> Callable[[str], NoReturn]:
    """Return what a test calls when a thing it needs is not there: skips at home, fails in CI."""

    def absent(reason: str) -> NoReturn:
        if IN_CI:
            pytest.fail(f"must not be absent in CI: {reason}", pytrace=False)
        pytest.skip(reason)

    return absent


@pytest.fixture(scope="session")
def chromium(absent: Callable[[str], NoReturn]) -> str:
    """Return the path of a Chromium that a browser test may start."""
    named = os.environ.get("EVENTBUS_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        absent("no Chromium: install Debian's chromium or name one in EVENTBUS_CHROMIUM")
    return found
