"""Play what a broker may do to handlers, from a seed: duplicates, other orders, lost acknowledgements, failures.

Every handling that was delivered goes over a stage, where the seed draws who makes the next step, and what goes wrong:
its acknowledgement gets lost after it has succeeded, its transaction is not committed, its publish does not get
through, or two processes handle it at once. In all these cases it comes again, as at least once says, and no failure
is counted. What a test calls directly is spared, but for this: every body goes through bytes.
"""

import sys
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from random import Random
from types import ModuleType
from typing import Any
from uuid import UUID

from eventbus.clock import Clock
from eventbus.context import Context, Origin, current, origin_of, seed_of
from eventbus.engine import Engine
from eventbus.errors import SettleError
from eventbus.fanout import FanOut
from eventbus.middleware import CallNext
from eventbus.registry import Known
from eventbus.store import DeadEntry
from eventbus.testing.stage import Player, Stage
from eventbus.testing.watched import Faults, WatchedStore

__all__ = ("Rehearsal", "RehearsalError", "RehearsedFaults", "seeded_scheduler")

ACK, COMMIT, PUBLISH, TWIN = "ack", "commit", "publish", "twin"
QUIETLY = 0.4
"""How likely nothing goes wrong."""
LATE = 0.25
"""How likely a message is a late one."""
TURNS = 3
"""Turns of the event loop that a publish takes at most."""

_playing: ContextVar[Player | None] = ContextVar("eventbus_playing", default=None)


class RehearsalError(AssertionError):
    """Say what a handler did that no broker will forgive, although the test itself passed."""


@dataclass(slots=True, eq=False)
class Rehearsal:
    """Hold the seed of one rehearsal and the schedule that was played."""

    seed: int
    stage: Stage
    random: Random
    numbers: dict[str, int]
    engine: Callable[[], Engine]

    @classmethod
    def of(cls, seed: int, engine: Callable[[], Engine]) -> "Rehearsal":
        """Return the rehearsal of a seed."""
        return cls(seed, Stage(Random(f"{seed} stage")), Random(f"{seed} ids"), {}, engine)

    @property
    def schedule(self) -> str:
        """What was played, one line for each decision; the same whenever the seed is the same."""
        return "\n".join(self.stage.schedule)

    def new_id(self, clock: Clock) -> str:
        """Return a UUID of version 7 that depends on nothing but the seed and the held clock."""
        bits = int(clock.now() * 1000) << 80 | self.random.getrandbits(80)
        bits = bits & ~(0xF << 76) | 0x7 << 76
        return str(UUID(int=bits & ~(0x3 << 62) | 0x2 << 62))

    def watch(self, store: WatchedStore | None, direct: Callable[[], int]) -> None:
        """Wait for calls to a store, and what the test calls itself, before anybody makes a step."""
        if store is None:
            self.stage.calls = direct
            return

        def holder() -> object:
            return store.units[0].owner if store.units and store.exclusive else store

        def calls() -> int:
            return direct() + (store.callers[None] if holder() is store else 0)

        def callers() -> Collection[object]:
            return {who for who, number in store.callers.items() if number}

        def waiters() -> Collection[object]:
            return set() if holder() is store else {*callers(), *(unit.owner for unit in store.units)} - {holder()}

        store.opener = _playing.get
        self.stage.calls, self.stage.callers, self.stage.waiters = calls, callers, waiters

    async def perform(self, ctx: Context, call_next: CallNext, delivered: bool) -> Any:
        """Handle a message as a broker would have it handled."""
        known = next(one for one in self.engine().registry.known if one.handler.name == ctx.handler)
        if not delivered:
            return await call_next(self._copied(ctx))
        player = self._cast(ctx, known)
        if player.fault == TWIN:
            return await self._twins(ctx, call_next, player)
        try:
            result = await self._run(ctx, call_next, player)
        except Exception as error:
            if not player.fired:
                raise
            self.stage.note(f"{player.name} comes again: {_REASONS[player.fault]} ({type(error).__name__})")
            return await self._run(ctx, call_next, Player(f"{player.name}, again"))
        if player.fault == ACK:
            self.stage.note(f"{player.name} comes again: {_REASONS[ACK]}")
            await self._again(ctx, call_next, Player(f"{player.name}, again"))
        return result

    def _cast(self, ctx: Context, known: Known) -> Player:
        """Draw what is to happen to one delivery; it depends on nothing but the message, the handler and the seed."""
        number = self.numbers.setdefault(ctx.message_id, len(self.numbers) + 1)
        name = f"{ctx.handler} {ctx.name}#{number}"
        chance = Random(f"{self.seed} {ctx.handler} {ctx.message_id} {ctx.attempt}")
        player = Player(name if ctx.attempt == 1 else f"{name}, attempt {ctx.attempt}", slow=chance.random() < LATE)
        faults = self._faults(ctx, known)
        if faults and chance.random() >= QUIETLY:
            player.fault = chance.choice(faults)
        return player

    def _faults(self, ctx: Context, known: Known) -> Sequence[str]:
        """Return what may go wrong with one delivery."""
        stored = self.engine().registry.wiring.store is not None
        transactional = bool(known.injected.transactions)
        if transactional:  # on any route to a broker its entry would be written before it is acknowledged
            return (COMMIT, ACK) if hasattr(ctx, "claim") else (COMMIT,)
        faults = [ACK, COMMIT if stored else PUBLISH]
        return faults if known.handler.options.ordered else [*faults, TWIN]

    async def _run(self, ctx: Context, call_next: CallNext, player: Player) -> Any:
        async def run() -> Any:
            return await call_next(ctx)

        token = _playing.set(player)
        try:
            return await self.stage.play(player, run())
        finally:
            _playing.reset(token)

    async def _again(self, ctx: Context, call_next: CallNext, player: Player) -> None:
        """Handle once more what is done; an entry that was settled with its transaction is recognised by it."""
        try:
            await self._run(ctx, call_next, player)
        except SettleError:
            if not hasattr(ctx, "claim"):
                raise
            self.stage.note(f"{player.name}: it is done already")

    async def _twins(self, ctx: Context, call_next: CallNext, player: Player) -> Any:
        self.stage.note(f"{player.name} comes twice at once")
        results = list[Any]()

        async def run(one: Player, _: None) -> None:
            results.append(await self._run(ctx, call_next, one))

        other = Player(f"{player.name}, its twin", slow=player.slow)
        failed = await FanOut([partial(run, player), partial(run, other)]).run(None)
        for place in sorted(failed):
            raise failed[place]
        return results[0]

    def _copied(self, ctx: Context) -> Context:
        """Return the context of an event that has been bytes, as every event may be one day."""
        seed, registry = current.get(), self.engine().registry
        type_: type = ctx.message.__class__
        subject = registry.subject(type_)
        if seed is None or (subject.command and not subject.targets):
            return ctx
        origin = origin_of(seed)
        codec = registry.wiring.codec
        message = codec.decode(codec.encode(ctx.message), type_)
        copied = Origin(message, origin.runtime, origin.cause, origin.key, origin.headers, origin.identity)
        return Context(seed_of(copied), ctx.handler, ctx.attempt)

    def judge(self) -> None:
        """Raise ``RehearsalError`` for what the test could not see."""
        if self.stage.blocked:
            who = "\n".join(f"  {name}: {seconds:.2g} s" for name, seconds in sorted(self.stage.blocked.items()))
            raise RehearsalError(
                f"a handler blocked the event loop, and every other one with it:\n{who}\n"
                "(await what it waits for, or make the handler a plain def, which runs in a thread)"
            )

    def sign(self, error: BaseException) -> None:
        """Add the seed and the schedule to what failed the test."""
        error.add_note(
            f'rehearsed with seed {self.seed}; to play it again: harness(bus, mode="rehearsal", seed={self.seed}), '
            f"or pytest --eventbus-seed={self.seed}\nplayed:\n"
            + ("\n".join(f"  {line}" for line in self.stage.schedule) or "  nothing")
        )


_REASONS = {
    ACK: "its acknowledgement was lost",
    COMMIT: "its transaction was not committed",
    PUBLISH: "its publish did not get through",
}


def _fires(fault: str) -> bool:
    """Tell whether a fault happens now, to whoever is playing; it happens once."""
    player = _playing.get()
    if player is None or player.fault != fault or player.fired:
        return False
    player.fired = True
    return True


class RehearsedFaults(Faults):
    """Say what the rehearsal lets go wrong in whoever is playing; everybody else is spared."""

    def __init__(self, seed: int, dealt: Callable[[Sequence[DeadEntry]], None]) -> None:
        self._random = Random(f"{seed} transport")
        self._dealt = dealt

    def commit(self) -> bool:
        """Tell whether the commit that begins now shall fail."""
        return _fires(COMMIT)

    def publish(self) -> bool:
        """Tell whether the publish that begins now shall not get through."""
        return _fires(PUBLISH)

    def turns(self) -> int:
        """Return how many turns of the event loop the publish that begins now shall take."""
        return 0 if _playing.get() is None else self._random.randrange(TURNS)

    def dealt(self, dead: Sequence[DeadEntry]) -> None:
        """Hear that somebody replays or discards some of the dead."""
        self._dealt(dead)


@contextmanager
def seeded_scheduler(seed: int) -> Generator[None]:
    """Let trio, which shuffles its tasks, shuffle them from the seed; asyncio keeps them in order."""
    trio: ModuleType | None = sys.modules.get("trio._core._run")
    shuffles: Random | None = getattr(trio, "_r", None)
    if shuffles is None:
        yield
        return
    before = shuffles.getstate()
    shuffles.seed(seed)
    try:
        yield
    finally:
        shuffles.setstate(before)
