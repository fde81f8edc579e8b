"""Prove that the memory store keeps what every store promises, and what only it promises."""

import pytest

from eventbus.stores.memory import MemoryStore
from eventbus.testing.store_exam import CHECKS, LIMITS, Check, examine


@pytest.mark.parametrize("check", CHECKS, ids=str)
async def test_exam(check: Check) -> None:
    """It passes the exam of every store."""
    await examine(check, lambda: MemoryStore(limits=LIMITS))
