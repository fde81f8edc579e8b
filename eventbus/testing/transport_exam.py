"""Examine a transport: plain functions over the port, chosen by what it declares. Declared and not kept fails.

>>> from eventbus.transports.memory import MemoryTransport
>>> bench = Bench(make=MemoryTransport)
>>> [check.number for check in checks_for(bench.make().capabilities)][:6]
[1, 2, 3, 4, 5, 6]

A test of a transport is then one function: ``await examine(bench, check)`` for every check.
"""

from itertools import chain

import anyio

from eventbus.testing import exam_consuming, exam_life, exam_publishing, exam_settling
from eventbus.testing.exam_bench import Bench, Check
from eventbus.transport import Capabilities

__all__ = ("CHECKS", "Bench", "Check", "checks_for", "examine")

CHECKS = tuple(
    sorted(
        chain(exam_publishing.CHECKS, exam_consuming.CHECKS, exam_settling.CHECKS, exam_life.CHECKS),
        key=lambda check: check.number,
    )
)
"""All checks, by number; the numbers are stable, and those that need a broker's own tools are asked elsewhere."""


def checks_for(capabilities: Capabilities) -> list[Check]:
    """Return the checks that a transport with these capabilities must pass."""
    return [check for check in CHECKS if check.needs(capabilities)]


async def examine(bench: Bench, check: Check) -> None:
    """Ask one question. Raises ``AssertionError``, maybe in a group, if what is declared is not kept."""
    with anyio.fail_after(10 * bench.patience):
        await check.run(bench)
