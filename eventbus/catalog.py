"""Say, as data and as text, who handles a message, where it goes and what is promised there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eventbus.registry import Known, Registry, Subject
from eventbus.routes import INLINE, MEMORY, STORE
from eventbus.transport import Capabilities

__all__ = ("PROMISES", "Explanation", "HandlerFacts", "MessageFacts", "explain", "kept_by", "promises")

PLACES = ("inline", "memory", "store", "broker with store", "broker alone")

PROMISES: Mapping[str, tuple[str, ...]] = {
    "P1 atomic": ("inside", "after commit", "yes", "yes", "no"),
    "P2 at least once": ("no", "while the process lives", "yes", "yes", "as the broker keeps it"),
    "P3 effectively once": ("yes, its transaction", "no", "yes", "yes", "no"),
    "P4 order": ("no", "per key", "per key", "per key", "as the broker keeps it"),
    "P5 recovery": ("no", "no", "yes", "yes", "by the broker"),
    "P6 isolation": ("yes", "yes", "yes", "yes", "yes"),
    "P7 bounded": ("yes", "yes", "yes", "yes", "yes"),
    "P8 drain": ("the caller's", "works it off", "yes", "yes", "yes"),
    "P9 duplicates": ("none", "none", "bounded", "bounded", "bounded"),
    "P10 clock": ("not used", "process clock", "store clock", "store clock", "broker clock"),
    "P11 same semantics": ("no retry, no order", "yes", "yes", "yes", "or refused at start"),
    "P12 cancellation": ("reaches the caller", "yes", "yes", "yes", "yes"),
}
"""Promise -> what is kept inline, by memory, by a store, by a broker in front of a store, by a broker alone."""

ORDERS = {"key": "per key, keys shared out", "exclusive": "per key, in one process", "none": "refused"}
RETURNS = {
    "link": "when its connection ends", "lease": "when its lease lapses", "rebalance": "when its group is dealt anew",
    "none": "no",
}  # fmt: skip
DUPLICATES = {"each": "bounded", "prefix": "all behind the oldest unsettled", "none": "none"}


@dataclass(frozen=True, slots=True)
class HandlerFacts:
    """Describe one handler of a message."""

    name: str
    source: str
    retry: int | None
    """Attempts, where retry applies."""
    ordered: bool
    timeout: float | None
    concurrency: int | None


@dataclass(frozen=True, slots=True)
class MessageFacts:
    """Describe one message: what it is, where it goes and who handles it."""

    name: str
    type: str
    kind: str
    version: int
    key: str | None
    route: tuple[str, ...]
    rule: str
    handlers: tuple[HandlerFacts, ...]
    promises: Mapping[str, str]
    """Promise -> what is kept where its routed handlers take it from."""
    live: str | None = None
    """The transport that carries it to the streams of other processes."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Describe the compiled wiring; ``str()`` is for people."""

    bus: str | None
    messages: tuple[MessageFacts, ...]

    def __str__(self) -> str:
        lines = [f"bus {self.bus or '(no name)'}: {_count(len(self.messages), 'message')}"]
        for message in self.messages:
            version = f" v{message.version}" if message.version > 1 else ""
            key = f", key {message.key}" if message.key else ""
            live = f", live through {message.live}" if message.live else ""
            route = f"{', '.join(message.route)} ({message.rule}){live}"
            lines.append(f"{message.kind} {message.name}{version}{key} -> {route}")
            lines.extend(f"  {_line(handler)}" for handler in message.handlers)
            if not message.handlers:
                lines.append("  (no handler here)")
        if len(self.messages) == 1:
            lines.extend(f"    {promise}: {kept}" for promise, kept in self.messages[0].promises.items())
        return "\n".join(lines)


def explain(registry: Registry, subjects: Sequence[Subject]) -> Explanation:
    """Return the description of some messages."""
    return Explanation(registry.wiring.name, tuple(_message(registry, subject) for subject in subjects))


def promises(registry: Registry, source: str | None) -> dict[str, str]:
    """Return what is promised to handlers that take a message from ``source``."""
    if source in (None, INLINE):
        place = "inline"
    elif source in (MEMORY, STORE):
        place = str(source)
    else:
        return kept_by(registry.wiring.transports[source].capabilities, stored=registry.wiring.store is not None)
    return _column(place)


def kept_by(broker: Capabilities, *, stored: bool) -> dict[str, str]:
    """Return what a broker that declares these capabilities keeps for handlers, in front of a store or alone."""
    kept = _column("broker with store" if stored else "broker alone")
    sure = broker.confirm != "none" and broker.returns != "none"
    if not sure:
        kept["P2 at least once"] = "no"
    if stored:
        if broker.order == "none":
            kept["P4 order"] = ORDERS["none"]
        return kept | {"delays": "any, by the store", "dead letters": "in the store"}
    if sure:
        kept["P2 at least once"] = "once confirmed"
    kept["P4 order"] = ORDERS[broker.order]
    kept["P5 recovery"] = RETURNS[broker.returns]
    kept["P9 duplicates"] = DUPLICATES[broker.settle]
    if not broker.retry:
        kept["P10 clock"] = "process clock"
    if not (broker.groups and broker.attempts):
        kept["P11 same semantics"] = f"refused: {'no groups' if not broker.groups else 'counts no attempts'}"
    longest = "any" if math.isinf(broker.retry) else f"to {broker.retry:,.10g} s, then held" if broker.retry else "held"
    return kept | {"delays": longest, "dead letters": "in the broker" if broker.dead else "no"}


def _column(place: str) -> dict[str, str]:
    return {promise: kept[PLACES.index(place)] for promise, kept in PROMISES.items()}


def _message(registry: Registry, subject: Subject) -> MessageFacts:
    handlers = [_handler(registry, known, INLINE) for known in subject.inline]
    handlers += [_handler(registry, known, subject.source or INLINE) for known in subject.routed]
    return MessageFacts(
        name=subject.spec.name,
        type=f"{subject.type.__module__}.{subject.type.__qualname__}",
        kind="command" if subject.command else "event",
        version=subject.spec.version,
        key=subject.spec.key,
        route=subject.route.transports,
        rule=subject.route.rule,
        handlers=tuple(handlers),
        promises=promises(registry, subject.source),
        live=None if subject.command else registry.wiring.live,
    )


def _handler(registry: Registry, known: Known, source: str) -> HandlerFacts:
    options = known.handler.options
    routed = source != INLINE
    return HandlerFacts(
        name=known.handler.name,
        source=source,
        retry=options.retry.attempts if routed else None,
        ordered=options.ordered and routed,
        timeout=known.timeout,
        concurrency=options.concurrency or (registry.wiring.limits.concurrency if routed else None),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _line(handler: HandlerFacts) -> str:
    facts = [handler.source]
    if handler.retry is not None:
        facts.append(_count(handler.retry, "attempt"))
    if handler.ordered:
        facts.append("ordered")
    if handler.timeout is not None:
        facts.append(f"timeout {handler.timeout:.3g} s")
    if handler.concurrency is not None:
        facts.append(f"{handler.concurrency} at once")
    return f"{handler.name} [{', '.join(facts)}]"
