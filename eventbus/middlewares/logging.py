"""Write one line for every handling, with its facts as fields; bodies only for those who ask."""

import logging
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from eventbus.context import Context
from eventbus.middleware import CallNext, outcome_of

__all__ = ("Logging",)

LEVELS = {"failed": logging.WARNING, "rejected": logging.WARNING}
"""Outcome -> level, where it is not the one for all others."""


class Logging:
    """Log every handling in one line: what, by whom, which attempt, how it ended and how long it took.

    The record has the fields ``message_name``, ``message_id``, ``handler``, ``attempt``, ``outcome``, ``ms``,
    ``correlation_id``, ``error`` and ``body``, of which the last two may be None. Characters that would begin another
    line, steer a terminal or hide text are escaped in all of them.

    Args:
        logger: where to; default: the logger ``eventbus.handling``.
        level: the level of what did not fail (failed and rejected: WARNING).
        body: makes of a message what is shown of it, which is where secrets are left out; None: nothing is shown.
            If it fails, that is said in its place.
        limit: characters kept of an error and of a body, escapes not counted.
        clock: seconds that only ever grow.

    The text of an error is its own: one that quotes a message shows it. Pydantic's are shown without the input.

    >>> from eventbus import EventBus
    >>> bus = EventBus(middleware=[Logging(body=lambda message: message.model_dump(exclude={"card"}))])
    """

    def __init__(
        self,
        logger: logging.Logger | None = None,
        *,
        level: int = logging.INFO,
        body: Callable[[Any], object] | None = None,
        limit: int = 2_000,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._logger = logger or logging.getLogger("eventbus.handling")
        self._level = level
        self._body = body
        self._limit = limit
        self._clock = clock

    async def __call__(self, ctx: Context, call_next: CallNext) -> Any:
        """Go on, and log how it ended."""
        began = self._clock()
        try:
            result = await call_next(ctx)
        except BaseException as error:
            self._log(ctx, error, began)
            raise
        self._log(ctx, None, began)
        return result

    def _log(self, ctx: Context, error: BaseException | None, began: float) -> None:
        outcome = outcome_of(error)
        level = LEVELS.get(outcome, self._level)
        if not self._logger.isEnabledFor(level):
            return
        facts: dict[str, Any] = {
            "message_name": plain(ctx.name),
            "message_id": plain(ctx.message_id),
            "handler": plain(ctx.handler),
            "attempt": ctx.attempt,
            "outcome": outcome,
            "ms": round((self._clock() - began) * 1_000, 3),
            "correlation_id": plain(ctx.correlation_id),
            "error": None if outcome in ("done", "cancelled") else plain(_read(_told, error)[: self._limit]),
            "body": None if self._body is None else plain(_read(self._body, ctx.message)[: self._limit]),
        }
        text = (
            "%(message_name)s %(message_id)s %(handler)s attempt %(attempt)d %(outcome)s in %(ms).3f ms, "
            "correlation %(correlation_id)s"
        )
        for name in ("error", "body"):
            if facts[name] is not None:
                text += f", {name}: %({name})s"
        self._logger.log(level, text, facts, extra=facts)


def plain(text: str) -> str:
    """Return a text in one line that cannot move the cursor, change colours or pretend to be another line."""
    return text if text.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _read(read: Callable[[Any], object], what: object) -> str:
    """Return what somebody else's code says about something; a log line must not fail a handling."""
    try:
        return str(read(what))
    except Exception as error:
        return f"({type(error).__name__} while it was read)"


def _told(error: Any) -> str:
    name = type(error).__name__
    if isinstance(error, ValidationError):
        told = error.errors(include_input=False, include_context=False, include_url=False)
        text = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in told)
        return f"{name}: {error.title}: {text}"
    text = str(error)
    if not text and error.__cause__ is not None:
        text = _told(error.__cause__)
    return f"{name}: {text}" if text else name
