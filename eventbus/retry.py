"""What becomes of a message whose handler failed: pure functions of policy, attempt, error and chance."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import cast

from eventbus.errors import Reject, RetryLater

__all__ = ("Again", "Dead", "Retry", "decide", "describe")

LEAVES = 50
"""Errors of one group that a description names."""

_BREAKS = re.compile(r"[\t-\r\x85\u2028\u2029]+")
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def decide(policy: "Retry", attempt: int, error: BaseException, random: Random, limit: int = 2_000) -> "Again | Dead":
    """Return what becomes of a message whose ``attempt`` (from 1) ended in ``error``.

    Dead at once: ``Reject``, errors in ``give_up_on`` or not in ``on``, and groups of nothing else. Otherwise again
    while attempts are left: after the longest wait that a ``RetryLater`` asks for, or the policy's own.

    Args:
        policy: the handler's.
        attempt: how often it was tried, this time included.
        error: what the handler raised; the errors of a group count, not the group.
        random: where jitter comes from.
        limit: characters kept of the error text.

    >>> decide(Retry(attempts=3), 3, KeyError("sku"), Random(0), 100)
    Dead(reason="failed 3 times; last: KeyError: 'sku'")
    """
    leaves = list(_leaves(error))
    waits = [leaf.seconds for leaf in leaves if isinstance(leaf, RetryLater)]
    if not waits and all(_is_final(policy, leaf) for leaf in leaves):
        return Dead(describe(error, limit))
    if attempt >= policy.attempts:
        times = "once" if attempt == 1 else f"{attempt} times"
        return Dead(_clipped(f"failed {times}; last: {describe(error, limit)}", limit))
    return Again(max(waits) if waits else policy.wait(attempt, random))


def describe(error: BaseException, limit: int) -> str:
    r"""Return "TypeName: message" in one line of at most ``limit`` characters, and the errors of a group after it.

    Line breaks become blanks, and characters that steer a terminal or hide text become ``?``. Never raises, whatever
    the error's own ``str()`` does.

    >>> describe(ValueError("first\nsecond"), 100)
    'ValueError: first second'
    """
    text = _named(error, limit)
    leaves = list(islice(_leaves(error), LEAVES))
    if leaves[0] is not error:
        text = f"{text}: {'; '.join(_named(leaf, limit) for leaf in leaves)}"
    return _clipped(_HIDDEN.sub("?", _BREAKS.sub(" ", text)), limit)


def _named(error: BaseException, limit: int) -> str:
    name = error.__class__.__name__
    try:
        text = str(error)[:limit].strip()
    except Exception:
        text = "(its text cannot be read)"
    return f"{name}: {text}" if text else name


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    waiting = [error]
    while waiting:
        error = waiting.pop()
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(reversed(cast("BaseExceptionGroup[BaseException]", error).exceptions))
        else:
            yield error


def _is_final(policy: "Retry", error: BaseException) -> bool:
    return isinstance(error, (Reject, *policy.give_up_on)) or not isinstance(error, policy.on)


@dataclass(frozen=True, slots=True)
class Again:
    """Have the message again ``after`` so many seconds."""

    after: float


@dataclass(frozen=True, slots=True)
class Dead:
    """Give the message up, for this ``reason``."""

    reason: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Say how often a failed message is tried, how long it waits in between, and which errors are worth it.

    The n-th failure waits ``initial * factor ** (n - 1)`` seconds, never more than ``maximum``; ``jitter`` takes
    between half of it and all of it. Raises ``ValueError`` for values that cannot work.

    >>> [Retry(jitter=False).wait(failure, Random()) for failure in (1, 2, 3)]
    [0.2, 0.4, 0.8]
    """

    attempts: int = 5
    initial: float = 0.2
    maximum: float = 30.0
    factor: float = 2.0
    jitter: bool = True
    on: tuple[type[Exception], ...] = (Exception,)
    give_up_on: tuple[type[Exception], ...] = ()
    """Beats ``on``."""

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(cast("object", self.attempts), int) or self.attempts < 1:
            raise ValueError(f"Retry(attempts=...) is a whole number from 1, not {self.attempts!r}")
        for name in ("initial", "maximum", "factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"Retry({name}=...) is a finite number, not {value!r}")
        if not 0 <= self.initial <= self.maximum:
            raise ValueError(f"Retry: 0 <= initial <= maximum does not hold for {self.initial} and {self.maximum}")
        if self.factor < 1:
            raise ValueError(f"Retry(factor=...) is 1 or more, not {self.factor}")
        for name in ("on", "give_up_on"):
            kinds = getattr(self, name)
            if not isinstance(kinds, tuple) or not all(_is_error(kind) for kind in cast("tuple[object, ...]", kinds)):
                raise ValueError(f"Retry({name}=...) is a tuple of exception classes, not {kinds!r}")

    def wait(self, failure: int, random: Random) -> float:
        """Return the seconds to wait after the n-th ``failure``, from 1."""
        try:
            full = min(self.initial * float(self.factor) ** (failure - 1), self.maximum)
        except OverflowError:
            full = self.maximum if self.initial else 0.0
        return full * (0.5 + random.random() / 2) if self.jitter else full


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)
