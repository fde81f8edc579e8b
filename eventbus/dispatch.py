"""Send a command to its handler, publish an event to all of its handlers and transports."""

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

from eventbus.clock import Runtime
from eventbus.context import EMPTY, Origin, Receipt, Seed, current, follow, origin_of
from eventbus.envelope import check_headers
from eventbus.errors import CircleError, EncodeError, NoHandlerError
from eventbus.fanout import FanOut, cut_short, failure_in
from eventbus.invoker import Invoker, Surroundings
from eventbus.limits import Limits
from eventbus.message import check_message_type, is_command
from eventbus.registry import Registry, Subject
from eventbus.routes import INLINE, MEMORY, STORE, Route

__all__ = ("Dispatch", "Posting", "Publish")

Handle = Callable[[Any], Coroutine[Any, Any, Any]]
"""Handles a message, or its seed."""

Publish = Callable[[Any, str | None, float | None, Mapping[str, str] | None, bool], Awaitable[Receipt]]
"""Publishes one event: event, key, delay, headers, atomic."""


class Posting:
    """Hold one message on its way out."""

    __slots__ = ("delay", "plan", "seed")

    def __init__(self, plan: "Plan", seed: Seed, delay: float) -> None:
        self.plan = plan
        self.seed = seed
        self.delay = delay

    @property
    def subject(self) -> Subject:
        """Return who is concerned by the message."""
        return self.plan.subject

    @property
    def origin(self) -> Origin:
        """Return the message with its identity."""
        return origin_of(self.seed)


class Plan:
    """Hold what one message type asks for when it is published: where it goes, and who handles it at once."""

    __slots__ = ("calls", "direct", "fan_out", "inline", "kept", "looked_at", "series", "subject", "targets")

    def __init__(self, subject: Subject, inline: Sequence[Invoker], follows: bool, durable: bool) -> None:
        self.subject = subject
        self.targets = subject.targets
        self.kept = tuple(one for one in self.targets if one == STORE or (one != MEMORY and durable))
        """Targets that get it from the store."""
        heard = subject.source == MEMORY and bool(subject.routed)
        self.direct = tuple(one for one in self.targets if one not in self.kept and (one != MEMORY or heard))
        """Targets that get it at once; memory only if somebody takes it from there."""
        self.inline = inline
        """Every inline handler, in the order of registration."""
        self.series = [place for place, invoker in enumerate(inline) if invoker.transactional]
        """Places of those that run one after another, because they share a transaction."""
        self.looked_at = follows or any(invoker.bare is None for invoker in inline)
        """Whether anybody may look at more than the message."""
        alone = [invoker for invoker in inline if not invoker.transactional]
        self.calls: Sequence[Handle] = [one.bare if one.bare and not self.looked_at else one.run for one in alone]
        """What runs side by side: takes the seed if it is looked at, the message otherwise."""
        self.fan_out = FanOut(self.calls).run

    async def run(self, seed: Seed) -> list[BaseException]:
        """Run the inline handlers; return what they raised, in the order of their registration."""
        if not self.series:
            token = current.set(seed)
            try:
                quick = await self.fan_out(seed if self.looked_at else seed[0])
            finally:
                current.reset(token)
            return self.noted(quick) if quick else []
        failed: dict[int, BaseException] = {}
        places = [place for place, invoker in enumerate(self.inline) if not invoker.transactional]
        in_series: Handle = partial(self._one_by_one, failed)
        outcome = await FanOut([*self.calls, in_series]).run(seed)
        failed |= {places[index]: error for index, error in outcome.items() if index < len(places)}
        return self.noted(failed)

    async def _one_by_one(self, failed: dict[int, BaseException], seed: Seed) -> None:
        for place in self.series:
            try:
                await self.inline[place].run(seed)
            except BaseException as error:
                if cut_short():
                    raise
                failure = failed[place] = failure_in(error) or error
                if not isinstance(failure, Exception):
                    raise

    def noted(self, failed: Mapping[int, BaseException]) -> list[BaseException]:
        """Return what handlers raised in the order of their registration, each with a note naming its handler."""
        for place, error in failed.items():
            note = f"in handler {self.inline[place].known.handler.name} of {self.subject.spec.name}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        return [failed[place] for place in sorted(failed)]


class Dispatch:
    """Run handlers in the caller's task and hand everything else to ``post``."""

    def __init__(
        self,
        registry: Registry,
        around: Surroundings,
        post: Callable[[Sequence[Posting], bool], Awaitable[None]],
        feed: Callable[[Seed], None],
    ) -> None:
        self.registry = registry
        self.runtime: Runtime = around.runtime
        self.limits: Limits = registry.wiring.limits
        self.invokers = {known.handler.name: Invoker(known, around) for known in registry.known}
        self.at_once = False
        """Whether routes are looked past and everything is handled in the caller's task (the test kit's)."""
        self._post = post
        self._feed = feed
        self._order = {known.handler.name: place for place, known in enumerate(registry.known)}
        self._follows = registry.leaves or any(
            known.injected.needs_context or known.middleware for known in registry.known
        )
        self._durable = registry.wiring.store is not None
        self._plans: dict[type, Plan] = {}

    def publisher(self, type_: type) -> Publish:
        """Return what publishes events of one type. Raises ``TypeError`` for what is no event."""
        plan, feed, runtime = self._plan(type_, False), self._feed, self.runtime
        get, put, back = current.get, current.set, current.reset
        fan_out, looked_at = plan.fan_out, plan.looked_at

        async def publish(
            event: Any, key: str | None, delay: float | None, headers: Mapping[str, str] | None, atomic: bool
        ) -> Receipt:
            return (await self.publish([event], key, delay, headers, atomic))[0]

        async def publish_routed(
            event: Any, key: str | None, delay: float | None, headers: Mapping[str, str] | None, atomic: bool
        ) -> Receipt:
            posting = self._posting(plan, event, key, delay, headers)
            await self._post((posting,), atomic)
            feed(posting.seed)
            if plan.inline and (failed := await plan.run(posting.seed)):
                raise _failed([plan], failed)
            return Receipt(posting.seed)

        async def publish_inline(
            event: Any, key: str | None, delay: float | None, headers: Mapping[str, str] | None, atomic: bool
        ) -> Receipt:
            if key is not None or delay is not None or headers:
                return await publish(event, key, delay, headers, atomic)
            cause = get()
            seed = [event, None, None, 0, runtime] if cause is None else follow(event, cause, runtime)
            feed(seed)
            token = put(seed)  # also where nobody looks: a circle is found by it
            try:
                failed = await fan_out(seed if looked_at else event)
            finally:
                back(token)
            if failed:
                raise _failed([plan], plan.noted(failed))
            return Receipt(seed)

        if plan.targets:
            return publish_routed
        return publish if plan.series else publish_inline

    async def publish(
        self, events: Sequence[object], key: str | None, delay: float | None, headers: Mapping[str, str] | None,
        atomic: bool,
    ) -> list[Receipt]:  # fmt: skip
        """Make events safe where their routes say, then run their inline handlers."""
        postings = [self._posting(self._plan(type(event), False), event, key, delay, headers) for event in events]
        await self._post_routed(postings, atomic)
        failures: list[BaseException] = []
        for posting in postings:
            self._feed(posting.seed)
            if posting.plan.inline:
                failures += await posting.plan.run(posting.seed)
                if not all(isinstance(failure, Exception) for failure in failures):
                    break
        if failures:
            raise _failed([posting.plan for posting in postings if posting.plan.inline], failures)
        return [Receipt(posting.seed) for posting in postings]

    async def enqueue(
        self, command: object, key: str | None, delay: float | None, headers: Mapping[str, str] | None, atomic: bool
    ) -> Receipt:
        """Send a command through its route, for later."""
        posting = self._posting(self._plan(type(command), True), command, key, delay, headers)
        if self.at_once:
            await self._sole(posting.subject).run(posting.seed)
        elif not posting.plan.targets:
            raise ValueError(
                f"enqueue({type(command).__name__}): the command has no route, so nothing would keep it for later; "
                f"give it one, routes={{{type(command).__name__}: 'store'}}, or send() it now"
            )
        await self._post_routed([posting], atomic)
        return Receipt(posting.seed)

    async def follow(self, messages: Iterable[object], atomic: bool = True) -> None:
        """Publish what a handler returned: events are published, commands enqueued."""
        for message in messages:
            if is_command(type(message)):
                await self.enqueue(message, None, None, None, atomic)
            elif message is not None:
                await self.publish([message], None, None, None, atomic)

    def _posting(
        self, plan: Plan, message: object, key: str | None, delay: float | None, headers: Mapping[str, str] | None
    ) -> Posting:
        cause = current.get()
        seed = [message, None, None, 0, self.runtime] if cause is None else follow(message, cause, self.runtime)
        if key is None and delay is None and not headers:
            return Posting(plan, seed, 0.0)
        subject = plan.subject
        if key is not None and (not isinstance(key, str) or not key):
            raise ValueError(f"key= takes text that is not empty, not {key!r}")
        if delay is not None and not 0 <= delay < float("inf"):
            raise ValueError(f"delay= takes seconds, 0 or more, not {delay!r}")
        if delay and not plan.targets and not self.at_once:
            raise ValueError(
                f"{subject.type.__name__} has no route, and nothing keeps an inline message for {delay:g} s: "
                f"give it a route, or leave delay= out"
            )
        headers = MappingProxyType(dict(headers)) if headers else EMPTY  # the publisher may go on with its own
        if headers:
            check_headers(headers, self.limits, subject.spec.name)
        if key is not None or headers:
            above = None if cause is None else origin_of(cause)
            seed[1] = Origin(message, self.runtime, above, key, headers)
        return Posting(plan, seed, delay or 0.0)

    def _plan(self, type_: type, command: bool) -> Plan:
        plan = self._plans.get(type_)
        if plan is None:
            subject = self._look_up(type_)
            inline = [self.invokers[known.handler.name] for known in subject.inline]
            plan = self._plans[type_] = Plan(subject, inline, self._follows, self._durable)
        if plan.subject.command is not command:
            raise TypeError(
                f"enqueue() takes a command; {type_.__name__} is an event: publish() it"
                if command
                else f"publish() takes an event; {type_.__name__} is a command: send() or enqueue() it"
            )
        return plan

    def _look_up(self, type_: type) -> Subject:
        check_message_type(type_)
        subject = self.registry.subject(type_)
        if self.at_once:
            known = sorted((*subject.inline, *subject.routed), key=lambda one: self._order[one.handler.name])
            return replace(subject, inline=tuple(known), routed=(), route=Route((INLINE,), "handled at once"))
        if subject.targets and type_ not in self.registry.subjects:
            raise EncodeError(
                subject.spec.name,
                f"{type_.__name__} has a route ({subject.route.rule}) but was unknown when the bus compiled: "
                "list it in Module(messages=[...])",
            )
        return subject

    async def _post_routed(self, postings: Sequence[Posting], atomic: bool) -> None:
        routed = [posting for posting in postings if posting.plan.targets]
        if routed:
            await self._post(routed, atomic)

    def _sole(self, subject: Subject) -> Invoker:
        known = (*subject.inline, *subject.routed)
        if not known:
            raise NoHandlerError(subject.spec.name)
        return self.invokers[known[0].handler.name]

    def sender(self, type_: type) -> Callable[[Any], Coroutine[Any, Any, Any]]:
        """Return what runs the one handler of a command. Raises ``NoHandlerError``, ``TypeError``."""
        check_message_type(type_)
        if not is_command(type_):
            raise TypeError(f"send() takes a command; {type_.__name__} is an event: publish() it")
        invoker = self._sole(self.registry.subject(type_))
        if invoker.bare is not None and not self._follows:
            return invoker.bare
        run = invoker.sender(self.runtime)
        return run if invoker.quick is None or self._follows else invoker.quick(run)


def _failed(plans: Sequence[Plan], failures: Sequence[BaseException]) -> BaseExceptionGroup[BaseException]:
    if len(failures) == 1 and (circle := _circle(failures[0])) is not None:
        failures = [circle.with_traceback(None)]  # fifty groups in each other would bury what it says
    names = ", ".join(sorted({plan.subject.spec.name for plan in plans}))
    return BaseExceptionGroup(f"{len(failures)} inline handler(s) of {names} failed", failures)


def _circle(failure: BaseException) -> BaseException | None:
    """Return the circle that is all there is in a group."""
    if isinstance(failure, BaseExceptionGroup):
        inside = cast("BaseExceptionGroup[BaseException]", failure).exceptions
        return inside[0] if len(inside) == 1 and isinstance(inside[0], CircleError) else None
    return None
