"""Every time and every ceiling of a bus, in one frozen record."""

from dataclasses import dataclass, fields

__all__ = ("Limits",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Hold every time (seconds) and every ceiling of a bus.

    A value that cannot work raises ``ValueError`` where the record is made.

    >>> Limits(lease=10.0).lease
    10.0
    """

    lease: float = 30.0
    """How long a claimed message belongs to its worker without a word from it."""
    sweep: float = 5.0
    """How often the worker looks for what nobody woke it for."""
    drain: float = 20.0
    """How long a stopping worker lets running handlers finish."""
    connect: float = 10.0
    """How long a publish waits for a transport that is not connected yet."""
    retention: float = 7 * 86_400.0
    """How long a finished entry is remembered: the window within which duplicates are recognised."""
    unknown: float = 86_400.0
    """How long a message of unknown name or newer version waits for a deploy before it is dead."""
    concurrency: int = 8
    """Handlings at once per routed handler and process, unless the handler says otherwise."""
    queue: int = 10_000
    """Unsettled messages per queue of the memory transport, beyond which publishers wait; and events that wait for the
    live transport, beyond which the oldest give way."""
    batch: int = 256
    """Messages per claim, settle, prune or publish statement."""
    waiting: int = 1_000_000
    """Entries waiting for one silent handler; beyond it new ones are born dead."""
    dead: int = 10_000
    """Dead messages kept per handler; at the ceiling the handler pauses, none is dropped."""
    crashes: int = 10
    """Claims that ended without a word before a message counts as a crash loop."""
    body: int = 262_144
    """Bytes of an encoded message body."""
    depth: int = 64
    """Nesting of a message body."""
    headers: int = 64
    """Headers on one message."""
    header: int = 4_096
    """Characters of one header's name and value together."""
    error: int = 2_000
    """Characters kept of an error text."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.type in ("int", int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(
                    f"Limits({field.name}=...) takes {'a whole number' if whole else 'seconds'}, not {value!r}"
                )
            if not 0 < value < float("inf"):
                raise ValueError(f"Limits({field.name}=...) must be greater than zero and finite, not {value!r}")
