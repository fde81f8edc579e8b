"""What a test has seen: every event, every handling, and who caused what."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from eventbus.context import Context, current, draining, origin_of
from eventbus.errors import RetryLater, SettleError
from eventbus.invoker import Lapse
from eventbus.message import spec_of
from eventbus.middleware import CallNext
from eventbus.store import DeadEntry

__all__ = ("Handling", "Record", "Seen", "UnobservedError")

M = TypeVar("M")

SHOWN = 10
"""How many messages of another kind a failed search names."""
LINES = 60
"""How many lines of what caused what are printed."""
WIDTH = 120
"""Characters of a message that are printed."""


class UnobservedError(AssertionError):
    """Say which handlers failed, and which messages died, without the test looking at it."""


class Seen(list[M]):
    """Be a list of messages that says, when it is empty, what there was instead."""

    def __init__(self, found: Sequence[M], wanted: str, instead: Callable[[], str]) -> None:
        super().__init__(found)
        self._wanted = wanted
        self._instead = instead

    def one(self) -> M:
        """Return the only message. Raises ``AssertionError`` that says what there was instead."""
        if len(self) != 1:
            raise AssertionError(f"{len(self)} x {self._wanted}, not one" if self else repr(self))
        return self[0]

    def __repr__(self) -> str:
        return super().__repr__() if self else f"[] (no {self._wanted}; {self._instead()})"

    __slots__ = ("_instead", "_wanted")


@dataclass(slots=True, eq=False)
class Handling:
    """Be one handling: who handled what, when, caused by whom, and how it ended."""

    handler: str
    message: Any
    message_id: str
    attempt: int
    began: float
    """Seconds of the held clock since the test began."""
    delivered: bool
    """Whether it came through a queue or store, so that nobody waits for its outcome."""
    cause: "Handling | None" = None
    """The handling that sent or published the message."""
    ended: float | None = None
    error: BaseException | None = None
    observed: bool = False

    @property
    def failed(self) -> bool:
        """Tell whether it failed, and nobody was there to catch it."""
        nobodys = isinstance(self.error, RetryLater | SettleError | Lapse)
        return self.delivered and isinstance(self.error, Exception) and not nobodys

    def __str__(self) -> str:
        if self.ended is None:
            how = "still runs"
        else:
            how = "done" if self.error is None else f"{type(self.error).__name__}: {self.error}"
        return f"{self.handler}, attempt {self.attempt} at {self.began:g} s: {how}"


_handling: ContextVar[Handling | None] = ContextVar("eventbus_handling", default=None)


@dataclass(slots=True, eq=False)
class Record:
    """Note what happens; ``watch`` is the outermost middleware of the bus."""

    monotonic: Callable[[], float]
    ids: Callable[[], str]
    perform: Callable[[Context, CallNext, bool], Any] | None = None
    """Goes around a handling, told whether it was delivered (a rehearsal does)."""
    news: Callable[[], None] = lambda: None
    """Called when a handling has ended."""
    events: list[Any] = field(default_factory=list[Any])
    handlings: list[Handling] = field(default_factory=list[Handling])
    inline: int = 0
    """How many handlings run that nobody delivered and no other handling contains."""
    _causes: dict[str, Handling] = field(default_factory=dict[str, Handling])
    _dealt: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])

    def deal(self, dead: Sequence[DeadEntry]) -> None:
        """Note that somebody replays or discards some of the dead, and so knows what they died of."""
        self._dealt.update((one.message_id, one.handler) for one in dead)

    def new_id(self) -> str:
        """Return the id of a new message, and remember which handling made it."""
        made, cause = self.ids(), _handling.get()
        if cause is not None:
            self._causes[made] = cause
        return made

    async def watch(self, ctx: Context, call_next: CallNext) -> Any:
        """Note what is handled and how it ends."""
        seed = current.get()
        root = seed is None or origin_of(seed).cause is None
        delivered = root and draining.get() is not None
        identity = ctx.message_id  # first, since the handling around this one made it
        handling = Handling(
            ctx.handler, ctx.message, identity, ctx.attempt, self.monotonic(), delivered, self._causes.get(identity)
        )
        self.handlings.append(handling)
        token = _handling.set(handling)
        self.inline += root and not delivered
        try:
            return await (self.perform(ctx, call_next, delivered) if self.perform else call_next(ctx))
        except BaseException as error:
            handling.error = error
            raise
        finally:
            handling.ended = self.monotonic()
            self.inline -= root and not delivered
            _handling.reset(token)
            self.news()

    def published(self, type_: type[M], facts: Mapping[str, Any]) -> Seen[M]:
        """Return the published events of a type with these values."""
        return self._seen(type_, facts, self.events, "published")

    def sent(self, type_: type[M], facts: Mapping[str, Any]) -> Seen[M]:
        """Return the handled messages of a type with these values."""
        return self._seen(type_, facts, [one.message for one in self.handlings], "handled")

    def handled(self, handler: str) -> Seen[Any]:
        """Return what a handler has handled without an error."""
        found = [one for one in self.handlings if one.handler == handler and one.ended is not None]
        good = [one.message for one in found if one.error is None]

        def instead() -> str:
            if found:
                return "it failed: " + _some(one for one in self.handlings if one.handler == handler)
            return "handled: " + _some(dict.fromkeys(one.handler for one in self.handlings))

        return Seen(good, f"message handled by {handler}", instead)

    def failed(self, handler: str) -> list[Exception]:
        """Return what a handler raised, which is thereby observed."""
        failed = [one for one in self.handlings if one.handler == handler and isinstance(one.error, Exception)]
        for one in failed:
            one.observed = True
        return [one.error for one in failed if isinstance(one.error, Exception)]

    def _seen(self, type_: type[M], facts: Mapping[str, Any], pool: Sequence[Any], how: str) -> Seen[M]:
        alike = [one for one in pool if isinstance(one, type_)]
        found = [one for one in alike if all(getattr(one, name, _ABSENT) == value for name, value in facts.items())]

        def instead() -> str:
            unknown = [name for name in facts if alike and not any(hasattr(one, name) for one in alike)]
            hint = f"{type_.__name__} has no {', '.join(unknown)}; " if unknown else ""
            return f"{hint}{how} instead: {_some(map(_shown, alike or pool))}"

        values = ", ".join(f"{name}={value!r}" for name, value in facts.items())
        return Seen(found, f"{type_.__name__}{f' with {values}' if values else ''} was {how}", instead)

    def unobserved(self, dead: Sequence[DeadEntry], looked: set[str], owner: str) -> UnobservedError | None:
        """Return what fails the test because nobody looked at it, or None.

        Args:
            dead: all that are dead now.
            looked: ids of the dead that the test has looked at.
            owner: what stands before a handler's name in stores and queues.
        """
        known = self._dealt.union((one.message_id, one.handler) for one in dead)
        forgiven = {(one.message_id, one.handler) for one in dead if one.id in looked}
        died = [one for one in dead if one.id not in looked]
        failed = [
            one
            for one in self.handlings
            if one.failed and not one.observed and (one.message_id, f"{owner}/{one.handler}") not in known
        ]
        if not died and not failed:
            return None
        lines = [f"{len(died)} message(s) died unobserved:"] if died else []
        lines += [f"  {entry.message} in {entry.handler}: {entry.error}" for entry in died]
        lines += [f"{len(failed)} failure(s) unobserved:"] if failed else []
        lines += [f"  {_name(one.message)} in {one}" for one in failed]
        guilty = {one.message_id for one in failed} | {one.message_id for one in died}
        culprits = [one for one in self.handlings if one.message_id in guilty]
        lines += ["what caused what:", *self.tree(culprits)] if culprits else []
        lines.append('(looking is t.dead, for what died, and t.failed("handler"), for what was tried again)')
        error = UnobservedError("\n".join(lines))
        errors = (one.error for one in culprits if one.failed and (one.message_id, one.handler) not in forgiven)
        error.__cause__ = next(errors, None)
        return error

    def tree(self, concerned: Sequence[Handling] | None = None) -> list[str]:
        """Return who caused what, one line per message and handling; ``concerned``: only what these belong to."""
        roots: dict[str, Handling] = {}
        for one in self.handlings if concerned is None else concerned:
            root = one
            while root.cause is not None:
                root = root.cause
            roots.setdefault(root.message_id, root)
        lines = [line for root in roots.values() for line in self._branch(root.message_id, root.message, 1)]
        return lines if len(lines) <= LINES else [*lines[:LINES], f"  ... and {len(lines) - LINES} more lines"]

    def _branch(self, message_id: str, message: object, depth: int) -> Iterator[str]:
        indent = "  " * depth
        yield f"{indent}{_name(message)} {_shown(message)}"
        for one in self.handlings:
            if one.message_id == message_id:
                yield f"{indent}  {one}"
                caused = {other.message_id: other.message for other in self.handlings if other.cause is one}
                for id_, made in caused.items():
                    yield from self._branch(id_, made, depth + 2)


def _name(message: object) -> str:
    return spec_of(type(message)).name


def _shown(message: object) -> str:
    text = repr(message)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _some(things: Any) -> str:
    listed = [str(one) for one in things]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return (", ".join(listed[:SHOWN]) or "nothing") + more


_ABSENT = object()
