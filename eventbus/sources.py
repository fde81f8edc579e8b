"""Make the worker's sources: who takes what from where, and what is done with it.

Handlers take from the store (claims), or directly from a transport. Between a store and a transport stand two more:
what comes in is ingested, one entry for each of our handlers, before it is acknowledged; what goes out is forwarded,
one entry at a time for each key.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol, runtime_checkable

from eventbus.channel import Source
from eventbus.claims import ClaimedDelivery, Claims
from eventbus.clock import Runtime
from eventbus.delivery import Consumer, Done, Gone, Postponed, Verdict, settle
from eventbus.entries import entry_of, outward, unwrap, wrap
from eventbus.errors import DecodeError, Lost, PublishError, StoreError
from eventbus.invoker import Invoker
from eventbus.ledger import Ledger
from eventbus.link import Link, Outage, Progress
from eventbus.registry import Known, Registry, Subject
from eventbus.retry import Dead, Retry, decide
from eventbus.routes import MEMORY, STORE
from eventbus.store import Recipient
from eventbus.transport import Delivery

__all__ = ("Countable", "Sources", "groups", "ordered_groups")

log = logging.getLogger("eventbus")


@runtime_checkable
class Countable(Protocol):
    """Count what a transport in this process still holds: the memory transport does."""

    def outstanding(self) -> int:
        """Count what is delivered and unsettled, or could be delivered now."""
        ...


def groups(registry: Registry, subject: Subject) -> tuple[str, ...]:
    """Return the consumer groups that take a message from the first transport of its route."""
    if not subject.routed:
        return ()
    if _is_ingested(registry, subject):
        return (registry.owner,)
    return tuple(registry.queue(known.handler) for known in subject.routed)


def ordered_groups(registry: Registry, subject: Subject) -> tuple[str, ...]:
    """Return those of its groups that have one key in one process, because a handler wants its keys in order."""
    ordered = [known for known in subject.routed if known.handler.options.ordered]
    if ordered and _is_ingested(registry, subject):
        return (registry.owner,)
    return tuple(registry.queue(known.handler) for known in ordered)


def _is_ingested(registry: Registry, subject: Subject) -> bool:
    return registry.wiring.store is not None and subject.source not in (None, MEMORY, STORE)


class Sources:
    """Make every source of one bus; ``claims`` are those that wait on the store."""

    def __init__(
        self, registry: Registry, links: Mapping[str, Link], invokers: Mapping[str, Invoker], runtime: Runtime,
        ledger: Ledger | None,
    ) -> None:  # fmt: skip
        self._registry = registry
        self._links = links
        self._invokers = invokers
        self._runtime = runtime
        self._ledger = ledger
        self._limits = registry.wiring.limits
        self.claims: dict[str, Claims] = {}

    def make(self) -> Iterator[Source]:
        """Yield all sources."""
        stored: dict[str, Known] = {}
        forwarded: set[str] = set()
        for subject in self._registry.subjects.values():
            if subject.source == STORE or _is_ingested(self._registry, subject):
                stored.update({known.handler.name: known for known in subject.routed})
            if _is_ingested(self._registry, subject) and subject.routed:
                yield self._ingest(self._links[str(subject.source)], subject)
            elif subject.source not in (None, STORE):
                for known in subject.routed:
                    yield self._direct(self._links[str(subject.source)], subject.spec.name, known)
            forwarded.update(target for target in subject.targets if target not in (MEMORY, STORE))
        if self._ledger is not None:
            for known in stored.values():
                yield self._stored(self._ledger, known)
            for target in sorted(forwarded):
                yield self._forward(self._ledger, self._links[target])

    def _direct(self, link: Link, topic: str, known: Known) -> Source:
        options = known.handler.options
        here = link.transport if isinstance(link.transport, Countable) else None
        longest = link.transport.capabilities.retry if here else _longest(link, options.ordered)
        consumer = self._consumer(known, longest)
        slots = options.concurrency or self._limits.concurrency
        prefetch = 2 * slots
        if options.ordered:  # a key that waits for its first message must not keep the others out
            prefetch = self._limits.queue if here else max(prefetch, self._limits.batch)
        source = self._received(link, topic, consumer.queue, prefetch, options.ordered, consumer.attend)
        return replace(source, slots=slots, longest=longest, remaining=here.outstanding if here else None)

    def _ingest(self, link: Link, subject: Subject) -> Source:
        ordered = any(known.handler.options.ordered for known in subject.routed)
        prefetch, attend = 2 * self._limits.concurrency, partial(self._take_in, subject, Outage(self._runtime))
        return self._received(link, subject.spec.name, self._registry.owner, prefetch, ordered, attend)

    def _received(
        self, link: Link, topic: str, group: str, prefetch: int, ordered: bool,
        attend: Callable[[Delivery], Awaitable[Verdict]],
    ) -> Source:  # fmt: skip
        lease = self._limits.lease
        return Source(
            name=f"{topic}@{group}",
            subscribe=partial(link.subscribe, topic, group=group, prefetch=prefetch, lease=lease, ordered=ordered),
            attend=attend,
            settle=settle,
            slots=self._limits.concurrency,
            ordered=ordered,
            longest=_longest(link, ordered),
            lease=lease if link.transport.capabilities.returns == "lease" else None,
        )

    def _stored(self, ledger: Ledger, known: Known) -> Source:
        options = known.handler.options
        slots = options.concurrency or self._limits.concurrency
        transactional = bool(known.injected.transactions)
        claims = Claims(
            ledger,
            Recipient(self._registry.queue(known.handler), options.ordered),
            slots,
            transactional=transactional,
            blocks=options.on_dead == "block",
        )
        self.claims[claims.recipient.name] = claims
        return self._claimed(claims, slots, partial(self._handle, self._consumer(known), transactional))

    def _forward(self, ledger: Ledger, link: Link) -> Source:
        slots = self._limits.concurrency
        claims = Claims(ledger, Recipient(outward(self._registry.owner, link.name), ordered=True), slots)
        self.claims[claims.recipient.name] = claims
        outage = Outage(self._runtime)

        def progress() -> Progress:
            # What waits for the end of a pause may be another process's by then.
            seen = claims.progress()
            return seen._replace(paused=seen.paused or outage.lasts(self._limits.sweep))

        return replace(self._claimed(claims, slots, partial(self._send_out, link, outage)), progress=progress)

    def _claimed(self, claims: Claims, slots: int, attend: Callable[[Delivery], Awaitable[Verdict]]) -> Source:
        return Source(
            name=claims.recipient.name,
            subscribe=claims.open,
            attend=attend,
            settle=lambda delivery, verdict: _claimed(delivery).write(verdict),
            post=lambda delivery, verdict, told: _claimed(delivery).post(verdict, told),
            slots=slots,
            busy=claims.busy,
            progress=claims.progress,
            lasting=True,
            lease=self._limits.lease,
        )

    def _consumer(self, known: Known, longest: float = 0.0) -> Consumer:
        invoker = self._invokers[known.handler.name]
        return Consumer(
            self._registry, invoker.unlimited if self._slots_suffice(known) else invoker, self._runtime, longest
        )

    def _slots_suffice(self, known: Known) -> bool:
        """Tell whether a handler runs in the slots of one source only, which then are its concurrency."""
        subjects = self._registry.subjects.values()
        taken = [one for one in subjects if known in one.routed]
        stored = all(one.source == STORE or _is_ingested(self._registry, one) for one in taken)
        elsewhere = any(one.command for one in taken) or any(known in one.inline for one in subjects)
        return (stored or len(taken) == 1) and not elsewhere

    async def _handle(self, consumer: Consumer, transactional: bool, delivery: Delivery) -> Verdict:
        claimed = _claimed(delivery)
        if claimed.entry.crashes > self._limits.crashes:
            return Dead(f"crash loop: {claimed.entry.crashes} claims in a row ended without a word")
        if claimed.lapsed and not transactional:  # with a transaction, the row lock decides
            return Gone()
        return await consumer.attend(claimed, claimed if transactional else None)

    async def _take_in(self, subject: Subject, outage: Outage, delivery: Delivery) -> Verdict:
        store = self._registry.wiring.store
        if store is None:
            raise TypeError("ingesting needs a store")
        try:
            envelope, _ = unwrap(delivery.wire, self._limits, self._runtime.clock)
        except DecodeError as error:
            return Dead(str(error))
        recipients = [
            Recipient(self._registry.queue(known.handler), known.handler.options.ordered) for known in subject.routed
        ]
        delay = max(envelope.due.timestamp() - self._runtime.clock.now(), 0.0) if envelope.due else 0.0
        try:
            touched = await store.add([entry_of(envelope, delay, recipients, subscribers=False)])
        except StoreError as error:
            log.warning("ingesting %s: %s", envelope.name, error)
            return Postponed(outage.failed())
        outage.over()
        for name in touched & self.claims.keys():
            self.claims[name].wake()
        return Done()

    async def _send_out(self, link: Link, outage: Outage, delivery: Delivery) -> Verdict:
        try:
            envelope, _ = unwrap(delivery.wire, self._limits, self._runtime.clock)
        except DecodeError as error:
            return Dead(str(error))
        try:
            await link.publish(envelope.name, [wrap(envelope, link.transport.capabilities)])
        except (Lost, PublishError) as error:
            failure = error.failed[0] if isinstance(error, PublishError) else error
            if isinstance(failure, Lost):
                return Postponed(outage.failed())
            return decide(Retry(), delivery.attempt, failure, self._runtime.random, self._limits.error)
        outage.over()
        return Done()


def _longest(link: Link, ordered: bool) -> float:
    """Return how long a delivery may stay away: an ordered one would find its followers in all of the prefetch."""
    return 0.0 if ordered else link.transport.capabilities.retry


def _claimed(delivery: Delivery) -> ClaimedDelivery:
    if not isinstance(delivery, ClaimedDelivery):
        raise TypeError(f"{delivery!r} was not claimed from a store")
    return delivery
