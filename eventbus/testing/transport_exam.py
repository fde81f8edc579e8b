"""Examine a transport: plain functions over the port, chosen by what it declares. Declared and not kept fails.

>>> from eventbus.transports.memory import MemoryTransport
>>> bench = Bench(make=MemoryTransport)
>>> [check.number for check in checks_for(bench.make().capabilities)][:6]
[1, 2, 3, 4, 5, 6]

A test of a transport is then one function: ``await examine(bench, check)`` for every check. Where a test can stop,
kill and empty the broker it says how in ``Bench(broker=...)``, and asks what ``broker_checks_for`` returns too.
"""

from itertools import chain

import anyio

from eventbus.testing import exam_broker, exam_consuming, exam_life, exam_network, exam_publishing, exam_settling
from eventbus.testing.exam_bench import Bench, Broker, Check, Network
from eventbus.transport import Capabilities

__all__ = (
    "BROKER_CHECKS",
    "CHECKS",
    "Bench",
    "Broker",
    "Check",
    "Network",
    "broker_checks_for",
    "checks_for",
    "examine",
)

CHECKS = tuple(
    sorted(
        chain(exam_publishing.CHECKS, exam_consuming.CHECKS, exam_settling.CHECKS, exam_life.CHECKS),
        key=lambda check: check.number,
    )
)
"""All checks of a transport alone, by number; the numbers are stable."""

BROKER_CHECKS = tuple(sorted(exam_broker.CHECKS + exam_network.CHECKS, key=lambda check: check.number))
"""The checks that stop, kill, empty or silence the broker."""


def checks_for(capabilities: Capabilities) -> list[Check]:
    """Return the checks that a transport with these capabilities must pass."""
    return [check for check in CHECKS if check.needs(capabilities)]


def broker_checks_for(capabilities: Capabilities) -> list[Check]:
    """Return the checks that a transport with these capabilities must pass whatever happens to its broker."""
    return [check for check in BROKER_CHECKS if check.needs(capabilities)]


async def examine(bench: Bench, check: Check) -> None:
    """Ask one question. Raises ``AssertionError``, maybe in a group, if what is declared is not kept."""
    with anyio.fail_after((30 if check in BROKER_CHECKS else 10) * bench.patience):
        await check.run(bench)
