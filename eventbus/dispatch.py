"""Send a command to its handler, publish an event to all of its handlers and transports."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from eventbus.clock import Runtime
from eventbus.context import EMPTY, Origin, current
from eventbus.envelope import check_headers
from eventbus.errors import EncodeError, NoHandlerError
from eventbus.fanout import cut_short, failure_in, fan_out
from eventbus.invoker import Invoker, Surroundings
from eventbus.limits import Limits
from eventbus.message import check_message_type, is_command, spec_of
from eventbus.registry import INLINE, Registry, Subject
from eventbus.routes import Route

__all__ = ("Dispatch", "Posting", "Receipt")

NESTED = 100
"""Messages of which each was sent or published while the one before was handled, all in one call."""


class Receipt:
    """Acknowledge a publish; ``id`` is the message's id, made when somebody first asks for it.

    It cannot be confused with a result: it has no truth value and no other attribute.
    """

    __slots__ = ("_origin",)

    def __init__(self, origin: Origin) -> None:
        self._origin = origin

    @property
    def id(self) -> str:
        """The id of the message, the same in every context, store and queue."""
        return self._origin.identity.id

    def __bool__(self) -> bool:
        raise TypeError("a Receipt is no result: only send() returns what a handler returned")

    def __repr__(self) -> str:
        return f"Receipt(id={self.id!r})"


class Posting:
    """Hold one message on its way out."""

    __slots__ = ("delay", "origin", "subject")

    def __init__(self, subject: Subject, origin: Origin, delay: float) -> None:
        self.subject = subject
        self.origin = origin
        self.delay = delay


class Dispatch:
    """Run handlers in the caller's task and hand everything else to ``post``."""

    def __init__(
        self,
        registry: Registry,
        around: Surroundings,
        post: Callable[[Sequence[Posting], bool], Awaitable[None]],
        feed: Callable[[object], None],
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
        self._subjects: dict[type, Subject] = {}

    async def publish(
        self, events: Sequence[object], key: str | None, delay: float | None, headers: Mapping[str, str] | None,
        atomic: bool,
    ) -> list[Receipt]:  # fmt: skip
        """Make events safe where their routes say, then run their inline handlers."""
        postings = [self._posting(event, False, key, delay, headers) for event in events]
        await self._post_routed(postings, atomic)
        failures: list[BaseException] = []
        for posting in postings:
            self._feed(posting.origin.message)
            if posting.subject.inline:
                failures.extend(await self._inline(posting))
                if not all(isinstance(failure, Exception) for failure in failures):
                    break
        if failures:
            names = ", ".join(sorted({posting.subject.spec.name for posting in postings if posting.subject.inline}))
            raise BaseExceptionGroup(f"{len(failures)} inline handler(s) of {names} failed", failures)
        return [Receipt(posting.origin) for posting in postings]

    async def enqueue(
        self, command: object, key: str | None, delay: float | None, headers: Mapping[str, str] | None, atomic: bool
    ) -> Receipt:
        """Send a command through its route, for later."""
        posting = self._posting(command, True, key, delay, headers)
        if self.at_once:
            await self._sole(posting.subject).run(posting.origin)
        elif not posting.subject.targets:
            raise ValueError(
                f"enqueue({type(command).__name__}): the command has no route, so nothing would keep it for later; "
                f"give it one, routes={{{type(command).__name__}: 'store'}}, or send() it now"
            )
        await self._post_routed([posting], atomic)
        return Receipt(posting.origin)

    async def follow(self, messages: Iterable[object], atomic: bool = True) -> None:
        """Publish what a handler returned: events are published, commands enqueued."""
        for message in messages:
            if is_command(type(message)):
                await self.enqueue(message, None, None, None, atomic)
            elif message is not None:
                await self.publish([message], None, None, None, atomic)

    def _posting(
        self, message: object, command: bool, key: str | None, delay: float | None, headers: Mapping[str, str] | None
    ) -> Posting:
        subject = self._subjects.get(type(message))
        if subject is None:
            subject = self._subjects[type(message)] = self._look_up(type(message))
        if subject.command is not command:
            raise TypeError(
                f"enqueue() takes a command; {type(message).__name__} is an event: publish() it"
                if command
                else f"publish() takes an event; {type(message).__name__} is a command: send() or enqueue() it"
            )
        if key is not None and (not isinstance(key, str) or not key):
            raise ValueError(f"key= takes text that is not empty, not {key!r}")
        if delay is not None and not 0 <= delay < float("inf"):
            raise ValueError(f"delay= takes seconds, 0 or more, not {delay!r}")
        if delay and not subject.targets and not self.at_once:
            raise ValueError(
                f"{subject.type.__name__} has no route, and nothing keeps an inline message for {delay:g} s: "
                f"give it a route, or leave delay= out"
            )
        if headers:
            check_headers(headers, self.limits, subject.spec.name)
        return Posting(subject, self._origin(message, key, headers), delay or 0.0)

    def _origin(self, message: object, key: str | None = None, headers: Mapping[str, str] | None = None) -> Origin:
        cause = current.get()
        if cause is not None:
            above: Origin | None = cause
            depth = 0
            while above is not None:
                above, depth = above.cause, depth + 1
            if depth >= NESTED:
                raise RecursionError(
                    f"{spec_of(type(message)).name} would be number {depth + 1} of messages handled each inside "
                    "the one before: do their handlers send or publish in a circle? Give one of them a route"
                )
        return Origin(message, self.runtime, cause, key, headers or EMPTY)

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
        routed = [posting for posting in postings if posting.subject.targets]
        if routed:
            await self._post(routed, atomic)

    async def _inline(self, posting: Posting) -> list[BaseException]:
        origin = posting.origin
        invokers = [self.invokers[known.handler.name] for known in posting.subject.inline]
        side_by_side = [invoker for invoker in invokers if not invoker.transactional]
        series = [invoker for invoker in invokers if invoker.transactional]
        failed: list[tuple[Invoker, BaseException]] = []

        async def one_by_one() -> None:
            for invoker in series:
                try:
                    await invoker.run(origin)
                except BaseException as error:
                    if cut_short():
                        raise
                    failed.append((invoker, failure_in(error) or error))
                    if failed[-1][1] is error and not isinstance(error, Exception):
                        raise

        calls: list[Callable[[], Awaitable[Any]]] = [partial(invoker.run, origin) for invoker in side_by_side]
        outcome = await fan_out([*calls, one_by_one] if series else calls)
        failed.extend((one, error) for one, error in zip(side_by_side, outcome, strict=False) if error is not None)
        failed.sort(key=lambda pair: invokers.index(pair[0]))
        for invoker, error in failed:
            note = f"in handler {invoker.known.handler.name} of {posting.subject.spec.name}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        return [error for _, error in failed]

    def _sole(self, subject: Subject) -> Invoker:
        known = (*subject.inline, *subject.routed)
        if not known:
            raise NoHandlerError(subject.spec.name)
        return self.invokers[known[0].handler.name]

    def sender(self, type_: type) -> Callable[[Any], Awaitable[Any]]:
        """Return what runs the one handler of a command. Raises ``NoHandlerError``, ``TypeError``."""
        check_message_type(type_)
        if not is_command(type_):
            raise TypeError(f"send() takes a command; {type_.__name__} is an event: publish() it")
        invoker = self._sole(self.registry.subject(type_))
        if invoker.bare is not None and not self._follows:
            return invoker.bare

        def run(command: object) -> Awaitable[Any]:
            return invoker.run(self._origin(command))

        return run if invoker.quick is None or self._follows else invoker.quick(run)
