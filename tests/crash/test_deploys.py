"""Prove that versions of an application take turns, and work side by side, without losing a message."""

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from eventbus import Event, EventBus, Limits, Module, Transaction
from tests.crash.fate import kept
from tests.crash.site import Site, run, until
from tests.servers.databases import execute

pytestmark = [pytest.mark.crash, pytest.mark.timeout(120)]


class Bought(Event, name="deploy.bought", version=1):
    """State that something was bought, as the old version knows it."""

    number: int


class BoughtNow(Event, name="deploy.bought", version=2):
    """State that something was bought, as the new version knows it."""

    number: int
    gift: bool = False


def old() -> Module:
    """Return the old version."""
    shop = Module("shop", messages=[Bought])

    @shop.on(Bought)
    async def keep(event: Bought, tx: Transaction[Any]) -> None:
        await note(tx, "keep", event.number)

    @shop.on(Bought)
    async def before(event: Bought, tx: Transaction[Any]) -> None:
        await note(tx, "renamed", event.number)

    @shop.on(Bought)
    async def removed(event: Bought, tx: Transaction[Any]) -> None:
        await note(tx, "removed", event.number)

    return shop


def new() -> Module:
    """Return the new version: one handler renamed, one removed, one added, and a newer message."""
    shop = Module("shop", messages=[BoughtNow])

    @shop.on(BoughtNow)
    async def keep(event: BoughtNow, tx: Transaction[Any]) -> None:
        await note(tx, "keep", event.number)

    @shop.on(BoughtNow, aliases=["before"])
    async def after(event: BoughtNow, tx: Transaction[Any]) -> None:
        await note(tx, "renamed", event.number)

    @shop.on(BoughtNow)
    async def added(event: BoughtNow, tx: Transaction[Any]) -> None:
        await note(tx, "added", event.number)

    return shop


async def note(tx: Transaction[Any], who: str, number: int) -> None:
    """Have the one effect of a handler."""
    await run(tx.session, "INSERT INTO effects (number, who) VALUES (:number, :who)", number=number, who=who)


@asynccontextmanager
async def running(site: Site, module: Module, *, consume: bool = True) -> AsyncIterator[EventBus]:
    """Run a version."""
    limits = Limits(lease=3.0, sweep=0.2, drain=5.0)
    async with kept(site.store) as store:
        bus = EventBus(module, name="shop", store=store, routes={"deploy.*": "store"}, limits=limits)
        async with bus.running(consume=consume):
            yield bus


async def publish(bus: EventBus, event: Callable[..., Any], numbers: range) -> None:
    """Publish one event for each number."""
    for number in numbers:
        async with bus.transaction():
            await bus.publish(event(number=number))


def had(site: Site, who: str) -> dict[int, int]:
    """Return the numbers for which a handler had its effect, and how often."""
    return Counter(number for number, name in site.rows("SELECT number, who FROM effects") if name == who)


def waiting(site: Site) -> dict[str, int]:
    """Return how many entries wait, by handler."""
    return Counter(name for (name,) in site.rows("SELECT recipient FROM eventbus_entry WHERE state = 0"))


def once(*numbers: range) -> dict[int, int]:
    """Return that each number had one effect."""
    return {number: 1 for several in numbers for number in several}


async def test_a_deploy_in_turns_loses_nothing(site: Site) -> None:
    """What waits for a renamed handler goes to its new name, for a removed one it waits; an added one gets the new."""
    first, second, third = range(5), range(5, 10), range(10, 15)
    async with running(site, old()) as bus:
        await publish(bus, Bought, first)
        await until(lambda: not waiting(site), 30)
    async with running(site, old(), consume=False) as bus:
        await publish(bus, Bought, second)
    async with running(site, new()) as bus:
        await publish(bus, BoughtNow, third)
        await until(lambda: set(waiting(site)) <= {"shop/shop.removed"}, 30)
    assert had(site, "keep") == had(site, "renamed") == once(first, second, third)
    assert had(site, "added") == once(third)
    assert had(site, "removed") == once(first)
    assert waiting(site) == {"shop/shop.removed": 10}
    async with kept(site.store) as store, store:
        assert await store.forget("shop/shop.removed") == 10
        assert {one.recipient: one.dead for one in await store.backlog() if one.dead} == {"shop/shop.removed": 10}


async def test_a_newer_message_waits_for_its_handler(site: Site) -> None:
    """A worker of the old version gives a message of the new one back, uncounted; the new one's handles it."""
    async with running(site, new(), consume=False):
        pass  # announces nothing of the old
    async with running(site, old()):
        async with running(site, new(), consume=False) as bus:
            await publish(bus, BoughtNow, range(1))
        given_back = "SELECT recipient FROM eventbus_entry WHERE state = 0 AND owner IS NULL AND heard > 0"
        await until(lambda: ("shop/shop.keep",) in site.rows(given_back), 30)
        assert had(site, "keep") == {}
    assert site.rows("SELECT MAX(failures) FROM eventbus_entry") == [(0,)]
    execute(site.database, "UPDATE eventbus_entry SET due_at = 0 WHERE state = 0")  # the wait of a deploy, shortened
    async with running(site, new()):
        await until(lambda: had(site, "keep") == once(range(1)), 30)


async def test_versions_side_by_side_share_what_both_have(site: Site) -> None:
    """While an old and a new version run, a message that both know is handled once by whoever takes it first."""
    numbers = range(20)
    async with running(site, old()) as bus, running(site, new()):
        await publish(bus, Bought, numbers)
        await until(lambda: not waiting(site), 30)
    assert had(site, "keep") == had(site, "added") == once(numbers)
    assert set(had(site, "renamed")) == set(numbers)
