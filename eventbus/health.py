"""Say how a running bus is doing, by what its parts do and not by asking them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from eventbus.engine import Engine

__all__ = ("Health", "SourceHealth", "report")


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """Describe one source of deliveries of this process."""

    connected: bool
    running: int
    handled: int
    lease_lost: int
    failures: int
    """Openings in a row that failed or did not last."""


@dataclass(frozen=True, slots=True)
class Health:
    """Describe a bus: ``healthy`` is False when it does not run or a part of it is not connected."""

    healthy: bool
    state: str
    transports: Mapping[str, bool]
    """Transport -> whether it is open."""
    sources: Mapping[str, SourceHealth]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def report(engine: Engine) -> Health:
    """Return the health of an engine."""
    channels = [] if engine.worker is None else engine.worker.channels
    transports = {link.name: link.is_up for link in engine.used_links()}
    sources = {
        channel.source.name: SourceHealth(
            channel.connected, len(channel.running), channel.handled, channel.lease_lost, channel.backoff.failures
        )
        for channel in channels
    }
    for follower in engine.broadcast or ():
        sources[follower.topic] = SourceHealth(follower.connected, 0, follower.taken, 0, follower.backoff.failures)
    well = engine.state == "running" and all(transports.values()) and all(one.connected for one in sources.values())
    return Health(well, engine.state, transports, sources)
