"""The exam notices who does not keep what it declares, where no transport of ours declares it."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest

from eventbus.errors import Lost, PublishError
from eventbus.testing.transport_exam import CHECKS, Bench, examine
from eventbus.transport import Capabilities, Subscription, Wire
from eventbus.transports.memory import MemoryTransport

MEMORY = MemoryTransport().capabilities
BY_NUMBER = {check.number: check for check in CHECKS}


class Until(MemoryTransport):
    """Return from publish when everything is settled; one that is ``hasty`` returns before."""

    def __init__(self, *, hasty: bool) -> None:
        super().__init__()
        self.hasty = hasty

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Publish, and wait."""
        await super().publish(topic, wires)
        while self.outstanding() and not self.hasty:  # noqa: ASYNC110 - nobody tells
            await anyio.sleep(0.001)


class Nobody(MemoryTransport):
    """Keep nothing for nobody; one that is ``hasty`` says nothing about it."""

    def __init__(self, *, hasty: bool) -> None:
        super().__init__()
        self.hasty = hasty
        self.readers = 0

    async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
        """Publish if somebody listens."""
        if self.readers:
            await super().publish(topic, wires)
        elif not self.hasty:
            raise PublishError(dict.fromkeys(range(len(wires)), Lost("nobody listens")))

    @asynccontextmanager
    async def subscribe(self, *args: Any, **options: Any) -> AsyncGenerator[Subscription]:
        """Subscribe, and be somebody."""
        async with super().subscribe(*args, **options) as subscription:
            self.readers += 1
            yield subscription


LOST = replace(MEMORY, unheard="lost")
CASES: list[tuple[int, type[Any], Capabilities]] = [
    (11, Until, replace(MEMORY, confirm="settled")),
    (12, Nobody, LOST),
    (13, Nobody, replace(LOST, confirm="stored")),
]


@pytest.mark.parametrize(("number", "transport", "promises"), CASES, ids=["11", "12", "13"])
@pytest.mark.parametrize("kept", [True, False])
async def test_a_confirmation_means_what_is_declared(
    number: int, transport: type[Any], promises: Capabilities, kept: bool
) -> None:
    """A publish that returns too early, or for nobody, fails the check that its capabilities choose."""
    check = BY_NUMBER[number]
    assert check.needs(promises)
    assert not check.needs(replace(promises, confirm="stored", unheard="kept")) or number == 12

    def make() -> Any:
        one = transport(hasty=kept == (number == 12))
        one.capabilities = promises
        return one

    bench = Bench(make=make, patience=2.0, quiet=0.02)
    if kept:
        await examine(bench, check)
        return
    with pytest.raises((AssertionError, ExceptionGroup)):
        await examine(bench, check)


async def test_a_fault_must_be_named_exactly() -> None:
    """A transport that names the neighbours of what failed too fails the check of its confirmation."""
    check = BY_NUMBER[7]

    class Broad(MemoryTransport):
        async def publish(self, topic: str, wires: Sequence[Wire]) -> None:
            raise PublishError(dict.fromkeys(range(len(wires)), Lost("all of it")))

    with pytest.raises(AssertionError, match="say by Bench"):
        await examine(Bench(make=Broad, patience=2.0), check)
    with pytest.raises(AssertionError, match="only 1 and 3"):
        await examine(Bench(make=Broad, patience=2.0, faulty=lambda _: anyio.CancelScope()), check)
