"""Say how a running bus is doing, by what its parts do and not by asking them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

from eventbus.channel import Channel
from eventbus.engine import Engine
from eventbus.errors import StoreError
from eventbus.registry import Registry
from eventbus.store import Backlog

__all__ = ("Health", "SourceHealth", "examine", "report", "stranded")

PATIENCE = 2
"""Sweeps after which somebody who has not answered is stuck."""


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """Describe one source of deliveries of this process."""

    connected: bool
    """Whether its subscription is open: a consumer is registered."""
    running: int
    handled: int
    lease_lost: int
    failures: int
    """Openings in a row that failed or did not last."""
    alive: bool = True
    """Whether its loops go on."""
    age: float | None = None
    """Seconds since it last received something, or the store last answered it; None: not yet."""
    waited: float | None = None
    """Seconds that it has been waiting for an answer of the store; None: it does not."""
    paused: bool = False
    """Whether it stands still: its handler has too many dead, or its destination does not take anything."""

    def stuck(self, name: str, patience: float) -> Iterator[str]:
        """Yield what is wrong with it in this process."""
        if not self.alive:
            yield f"{name}: its loops have ended"
        if self.waited is not None and self.waited >= patience:
            yield f"{name} is stuck: the store has not answered it for {self.waited:.0f} s"

    def away(self, name: str) -> Iterator[str]:
        """Yield what is wrong with what it works with."""
        if not self.connected:
            yield f"{name} is not connected"
        if self.paused:
            yield f"{name} is paused"


@dataclass(frozen=True, slots=True)
class Health:
    """Describe a bus: ``healthy`` is False when there are ``faults``."""

    healthy: bool
    state: str
    transports: Mapping[str, bool]
    """Transport -> whether it is open; what is to go out through one that is not waits."""
    sources: Mapping[str, SourceHealth]
    alive: bool = False
    """Whether this process runs and nothing in it is stuck, so that a restart would mend nothing."""
    faults: tuple[str, ...] = ()
    """What is wrong, in sentences without secrets."""
    answered: float | None = None
    """Seconds since the store answered this process's sweeping; None: there is no store."""
    backlog: Mapping[str, Mapping[str, Any]] | None = None
    """Recipient -> ``waiting``, ``dead``, ``oldest`` (the seconds that the first of them has been due) and
    ``announced``; None: not asked for."""
    stalls: int = 0
    """How often the event loop of this process was seen to stand still for a second or more."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def report(engine: Engine) -> Health:
    """Return the health of an engine as this process sees it, without asking anybody."""
    now, patience = engine.runtime.clock.monotonic(), PATIENCE * engine.limits.sweep
    ledger = engine.ledger
    if ledger is not None and ledger.store.exclusive and now - ledger.wrote < patience:
        patience = inf  # whoever waits has only to wait for its turn with the one writer
    channels = [] if engine.worker is None else engine.worker.channels
    transports = {link.name: link.is_up for link in engine.used_links()}
    sources = {channel.source.name: _source(channel, now) for channel in channels}
    for follower in engine.broadcast or ():
        sources[follower.topic] = SourceHealth(follower.connected, 0, follower.taken, 0, follower.backoff.failures)
    stuck = [] if engine.state == "running" else [f"the bus is {engine.state}"]
    away = [f"transport {name} is not open" for name, is_up in transports.items() if not is_up]
    for name, source in sources.items():
        stuck += source.stuck(name, patience)
        away += source.away(name)
    answered = None if ledger is None else now - ledger.answered
    if ledger is not None and ledger.asked is not None and now - ledger.asked >= patience:
        stuck.append(f"settling is stuck: the store has not answered for {now - ledger.asked:.0f} s")
    if ledger is not None and ledger.troubled:
        away.append("the store fails")
    elif answered is not None and answered >= patience:
        stuck.append(f"the store has not answered for {answered:.0f} s")
    faults = (*stuck, *away)
    stalls = 0 if engine.worker is None else engine.worker.stalls
    return Health(not faults, engine.state, transports, sources, not stuck, faults, answered, stalls=stalls)


def _source(channel: Channel, now: float) -> SourceHealth:
    progress = channel.source.progress() if channel.source.progress is not None else None
    times = [channel.received, progress.answered if progress else None]
    return SourceHealth(
        channel.connected,
        len(channel.running),
        channel.handled,
        channel.lease_lost,
        channel.backoff.failures,
        channel.alive,
        min((now - time for time in times if time is not None), default=None),
        None if progress is None or progress.asked is None else now - progress.asked,
        progress is not None and progress.paused,
    )


async def examine(engine: Engine) -> Health:
    """Return the health of an engine with what waits in its store, counted at most once a sweep."""
    backlog: Sequence[Backlog] | None = None
    fault = None
    if engine.ledger is not None:
        with engine.runtime.clock.move_on_after(engine.limits.sweep):
            try:
                backlog = await engine.ledger.backlog()
            except StoreError as error:
                fault = f"the store cannot be read: {type(error).__name__}"  # its text may name the server
        if backlog is None and fault is None:
            fault = "the store cannot be read in time"
    seen = report(engine)
    found = [fault] if fault else [] if backlog is None else stranded(engine.registry, backlog)
    counts = None if backlog is None else {one.recipient: {**one._asdict()} for one in backlog}
    for one in (counts or {}).values():
        del one["recipient"]
    return replace(seen, healthy=seen.healthy and not found, faults=(*seen.faults, *found), backlog=counts)


def stranded(registry: Registry, backlog: Sequence[Backlog]) -> list[str]:
    """Return a sentence for each recipient whose messages wait for nobody."""
    faults: list[str] = []
    for one in backlog:
        owner, outwards, transport = one.recipient.partition(">")
        nobody = owner == registry.owner and transport not in registry.wiring.transports
        if one.waiting and (nobody if outwards else not one.announced):
            why = "this bus has no such transport" if outwards else "nobody has announced it for a day"
            faults.append(f"{one.recipient}: {one.waiting} wait and {why}")
    return faults
