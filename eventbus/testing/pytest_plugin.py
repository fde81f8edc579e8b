"""Fixtures and options for pytest; nothing happens to a test that does not ask for a fixture.

Installed, the plugin is found by pytest itself; ``-p eventbus.testing.pytest_plugin`` loads it from a checkout.

- ``eventbus_harness``: ``harness`` itself, to be called as such; with ``--eventbus-rehearse=N`` each test that asks for
  it runs under N seeds instead, in ``mode="rehearsal"``, unless the test names a mode.
- ``eventbus_seed``: the seed of this run, or None.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastapi import FastAPI

    from eventbus.bus import EventBus
    from eventbus.store import Store
    from eventbus.testing.harness import Harness, Mode

__all__ = ("eventbus_harness", "eventbus_seed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options."""
    group = parser.getgroup("eventbus")
    group.addoption(
        "--eventbus-rehearse",
        type=int,
        default=0,
        metavar="N",
        help="run each test that asks for eventbus_harness as a rehearsal, under the seeds 0 to N - 1",
    )
    group.addoption(
        "--eventbus-seed", type=int, default=None, metavar="SEED", help="the same under this one seed, to play it again"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for the harness once for each seed."""
    seed: int | None = metafunc.config.getoption("--eventbus-seed")
    number: int = metafunc.config.getoption("--eventbus-rehearse") or 0
    seeds = range(number) if seed is None else [seed]
    if seeds and "eventbus_harness" in metafunc.fixturenames:
        metafunc.parametrize("eventbus_seed", seeds, ids=[f"seed{one}" for one in seeds])


@pytest.fixture
def eventbus_seed() -> int | None:
    """Return the seed under which this test is rehearsed, or None."""
    return None


@pytest.fixture
def eventbus_harness(eventbus_seed: int | None) -> Callable[..., "AbstractAsyncContextManager[Harness]"]:
    """Return what opens a harness, called as ``harness`` is."""

    def opened(
        bus: "EventBus",
        *,
        app: "FastAPI | None" = None,
        mode: "Mode | None" = None,
        store: "Store | None" = None,
        overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
        seed: int | None = None,
    ) -> "AbstractAsyncContextManager[Harness]":
        from eventbus.testing.harness import harness  # noqa: PLC0415 - not before a test asks for it

        rehearsed = mode is None and eventbus_seed is not None
        return harness(
            bus,
            app=app,
            mode="rehearsal" if rehearsed else mode or "queued",
            store=store,
            overrides=overrides,
            seed=eventbus_seed if rehearsed and seed is None else seed,
        )

    return opened
