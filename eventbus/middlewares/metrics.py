"""Count handlings in this process, readable as plain data and as Prometheus's text."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from eventbus.context import Context
from eventbus.middleware import CallNext, outcome_of

__all__ = ("Count", "Metrics")


@dataclass(slots=True, kw_only=True)
class _Tally:
    done: int = 0
    failed: int = 0
    rejected: int = 0
    postponed: int = 0
    cancelled: int = 0
    retried: int = 0
    seconds: float = 0.0
    slowest: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Count the handlings of one message type by one handler since the process began."""

    handler: str
    message: str
    """The wire name."""
    done: int
    failed: int
    rejected: int
    postponed: int
    cancelled: int
    retried: int
    """How many of them all were no first attempt."""
    seconds: float
    """The time of all of them together."""
    slowest: float
    """The longest of them, in seconds."""


class Metrics:
    """Count every handling by its outcome, and its time.

    There is one count for each handler and message type, so their number has a ceiling of its own. They belong to this
    object and to this process.

    Args:
        clock: seconds that only ever grow.

    >>> from anyio import run
    >>> from eventbus import Event, EventBus, Module
    >>> class Paid(Event, name="shop.paid"): ...
    >>> shop, metrics = Module("shop"), Metrics()
    >>> @shop.on(Paid)
    ... async def thank(event: Paid) -> None: ...
    >>> _ = run(EventBus(shop, middleware=[metrics]).publish, Paid())
    >>> [(count.handler, count.message, count.done) for count in metrics.counts()]
    [('shop.thank', 'shop.paid', 1)]
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._tallies: dict[tuple[str, str], _Tally] = {}

    async def __call__(self, ctx: Context, call_next: CallNext) -> Any:
        """Go on, and count how it ended."""
        began = self._clock()
        try:
            result = await call_next(ctx)
        except BaseException as error:
            self._count(ctx, outcome_of(error), self._clock() - began)
            raise
        self._count(ctx, "done", self._clock() - began)
        return result

    def _count(self, ctx: Context, outcome: str, seconds: float) -> None:
        tally = self._tallies.setdefault((ctx.handler, ctx.name), _Tally())
        setattr(tally, outcome, getattr(tally, outcome) + 1)
        tally.retried += ctx.attempt > 1
        tally.seconds += seconds
        tally.slowest = max(tally.slowest, seconds)

    def counts(self) -> list[Count]:
        """Return all counts so far, by handler and message."""
        return [
            Count(handler=handler, message=message, **{one.name: getattr(tally, one.name) for one in fields(tally)})
            for (handler, message), tally in sorted(self._tallies.items())
        ]

    def prometheus(self) -> str:
        """Return all counts in Prometheus's text format, to be served as ``text/plain; version=0.0.4``."""
        lines = ["# TYPE eventbus_handlings_total counter"]
        ends: list[str] = ["# TYPE eventbus_handling_seconds summary"]
        again: list[str] = ["# TYPE eventbus_retried_total counter"]
        slow: list[str] = ["# TYPE eventbus_handling_seconds_max gauge"]
        for one in self.counts():
            who = f'handler="{_label(one.handler)}",message="{_label(one.message)}"'
            words = ("done", "failed", "rejected", "postponed", "cancelled")
            lines += [f'eventbus_handlings_total{{{who},outcome="{word}"}} {getattr(one, word)}' for word in words]
            ends.append(f"eventbus_handling_seconds_sum{{{who}}} {one.seconds!r}")
            ends.append(f"eventbus_handling_seconds_count{{{who}}} {sum(getattr(one, word) for word in words)}")
            again.append(f"eventbus_retried_total{{{who}}} {one.retried}")
            slow.append(f"eventbus_handling_seconds_max{{{who}}} {one.slowest!r}")
        return "\n".join([*lines, *again, *ends, *slow, ""])


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
