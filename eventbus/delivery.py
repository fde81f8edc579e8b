"""One delivery's life: decode it, run its handler, say what becomes of it. No loops."""

import logging
from dataclasses import dataclass
from typing import Any, cast

from eventbus.clock import Runtime
from eventbus.context import Identity, Origin, Seed, draining, seed_of
from eventbus.entries import unwrap
from eventbus.envelope import Envelope
from eventbus.errors import DecodeError, SettleError, UnknownMessageError
from eventbus.fanout import cancellings, cut_short, failure_in, isolated
from eventbus.invoker import Claim, Invoker, Lapse, UnbegunError
from eventbus.registry import Registry
from eventbus.retry import Again, Dead, decide, describe
from eventbus.transport import Delivery, TransportError

__all__ = ("Consumer", "Cut", "Done", "Gone", "Postponed", "Verdict", "settle")

log = logging.getLogger("eventbus")

UNKNOWN_AGAIN = 30.0
"""Seconds after which a message of unknown name or newer version is looked at again."""

UNBEGUN_AGAIN = 0.5
"""Seconds after which a message comes again that was handed back because the database was others' all the time."""

SOON = 0.001
"""The shortest wait before a retry (``Delivery.retry(0)`` would mean something else), and what is not worth one."""


@dataclass(frozen=True, slots=True)
class Done:
    """Say that it was handled."""


@dataclass(frozen=True, slots=True)
class Postponed:
    """Say that it is to come again without a failure being counted."""

    after: float


@dataclass(frozen=True, slots=True)
class Gone:
    """Say that the right to settle it is lost, so nothing is written."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Say that its handling was cancelled: it neither succeeded nor failed."""


Verdict = Done | Again | Dead | Postponed | Gone | Cut


class _UnwantedError(Exception):
    """Say that a handler no longer wants a message that was written for it; another deploy may."""


class Consumer:
    """Attend to the deliveries of one handler."""

    __slots__ = ("_invoker", "_longest", "_registry", "queue", "retry", "runtime")

    def __init__(self, registry: Registry, invoker: Invoker, runtime: Runtime, longest: float = 0.0) -> None:
        self._registry = registry
        self._longest = longest
        self.runtime = runtime
        self._invoker = invoker
        self.queue = registry.queue(invoker.known.handler)
        self.retry = invoker.known.handler.options.retry

    async def attend(self, delivery: Delivery, claim: Claim | None = None) -> Verdict:
        """Run the handler on one delivery and return what becomes of it; only cancellation gets out."""
        clock, attempt = self.runtime.clock, max(delivery.attempt, 1)
        try:
            envelope, ours = unwrap(delivery.wire, self._registry.wiring.limits, clock)
        except DecodeError as error:
            return Dead(str(error))
        if envelope.due is not None:
            wait = envelope.due.timestamp() - clock.now()
            if wait > SOON:
                return Postponed(wait)
            if (envelope.due - envelope.time).total_seconds() <= self._longest:
                attempt = max(attempt - 1, 1)  # the transport, which kept it until now, has counted that
        try:
            seed = self._seed(envelope, ours)
        except (UnknownMessageError, _UnwantedError) as error:
            age = clock.now() - envelope.time.timestamp()
            return Postponed(UNKNOWN_AGAIN) if age < self._registry.wiring.limits.unknown else Dead(str(error))
        except DecodeError as error:
            return Dead(str(error))
        except Exception as error:
            log.exception("%s: decoding message %s failed", self.queue, envelope.id)
            return Dead(describe(error, self._registry.wiring.limits.error))
        before = cancellings()
        try:
            await isolated(lambda: self._run(seed, attempt, claim))
        except Lapse as error:
            log.warning("%s: the store failed, the lease decides: %s", self.queue, error.__cause__)
            return Gone()
        except UnbegunError as error:
            log.warning("%s: no transaction could begin within %g s, later again", self.queue, error.seconds)
            return Postponed(UNBEGUN_AGAIN)
        except BaseException as error:
            return self._ended(error, attempt, claim, before)
        return Done()

    async def _run(self, seed: Seed, attempt: int, claim: Claim | None) -> Any:
        draining.set(self.queue)
        return await self._invoker.run(seed, attempt, claim)

    def _ended(self, error: BaseException, attempt: int, claim: Claim | None, before: int) -> Verdict:
        """Return what becomes of a message whose handler raised; a cancellation from outside goes on."""
        if claim is not None and isinstance(error, SettleError):
            return Gone()
        if cut_short(before):
            told = describe(error, 200)
            if not isinstance(error, (Exception, BaseExceptionGroup)):
                raise error
            log.warning("%s: a handler that was cancelled ended in %s", self.queue, told)
            return Cut()
        failure = failure_in(error)
        if failure is None:
            if _interrupts(error):
                raise error
            failure = RuntimeError(f"the handler raised {describe(error, 200)}")
            failure.__cause__ = error
        return self._failed(failure, attempt)

    def _failed(self, error: Exception, attempt: int) -> Verdict:
        limit = self._registry.wiring.limits.error
        verdict = decide(self.retry, attempt, error, self.runtime.random, limit)
        text = describe(error, limit)
        if isinstance(verdict, Dead):
            log.error("%s gave up after attempt %d: %s", self.queue, attempt, text, exc_info=error)
        else:
            log.warning("%s failed at attempt %d, again in %.3f s: %s", self.queue, attempt, verdict.after, text)
        return verdict

    def _seed(self, envelope: Envelope, ours: bool) -> Seed:
        registry = self._registry
        type_ = registry.type_of(envelope.name, envelope.version)
        wanted = self._invoker.known.handler.types
        if type_ not in wanted and not issubclass(type_, wanted):  # asking a model class takes its time
            raise _UnwantedError(f"{self.queue} does not handle {envelope.name!r}: it did when this was published")
        codec = registry.wiring.codec
        message: object = (codec.reread if ours else codec.decode)(envelope.body, type_)
        identity = Identity(envelope.id, envelope.correlation, envelope.causation, envelope.time)
        return seed_of(Origin(message, self.runtime, None, envelope.key, envelope.headers, identity))


def _interrupts(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return cast("BaseExceptionGroup[BaseException]", error).subgroup(KeyboardInterrupt) is not None
    return isinstance(error, KeyboardInterrupt)


async def settle(delivery: Delivery, verdict: Verdict) -> bool:
    """Tell the transport what becomes of a delivery; False if it is, or will be, somebody else's."""
    try:
        match verdict:
            case Done():
                await delivery.ack()
            case Again(after=after):
                await delivery.retry(max(after, SOON))
            case Postponed(after=after):
                await delivery.retry(after)
            case Dead(reason=reason):
                await delivery.reject(reason)
            case _:
                return False
    except TransportError:
        return False
    return True
