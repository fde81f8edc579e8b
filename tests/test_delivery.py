"""One delivery: decoded, handled, judged; and what is told to the transport."""

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, cast

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Event, EventBus, Limits, Lost, Module, Reject, Retry, RetryLater, SettleError, UnknownMessageError
from eventbus.clock import Runtime
from eventbus.cloudevents import binary, structured
from eventbus.context import draining
from eventbus.delivery import Consumer, Cut, Done, Gone, Postponed, Verdict, settle
from eventbus.envelope import Envelope
from eventbus.invoker import Claim, Invoker, Lapse
from eventbus.retry import Again, Dead
from eventbus.testing.clock import VirtualClock
from eventbus.transport import Wire
from tests.doubles import Letter

asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])
tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="none")

Action = Callable[[], Awaitable[None]]


class Paid(Event, name="v.paid", version=2):
    """State that something was paid."""

    sum: int


class Desk:
    """Hold one handler, which does as it is told, and a clock that stands still."""

    def __init__(self, action: Action | None = None, *, longest: float = 0.0, **options: Any) -> None:
        self.clock = VirtualClock()
        self.seen: list[tuple[int, int]] = []
        module = Module("m")
        options.setdefault("retry", Retry(attempts=3, initial=1.0, jitter=False))

        async def note(ctx: Any, call_next: Any) -> Any:
            self.seen.append((ctx.message.sum, ctx.attempt))
            return await call_next(ctx)

        @module.on(Paid, **options)
        async def paid(event: Paid) -> None:
            if action is not None:
                await action()

        bus = EventBus(module, name="shop", routes={Paid: "memory"}, middleware=[note])
        self.registry = bus.engine.registry
        self.invoker = bus.engine.dispatch.invokers["m.paid"]
        self.runtime = Runtime(self.clock, random=Random(0))
        self.consumer = Consumer(self.registry, self.invoker, self.runtime, longest)

    def envelope(self, **facts: Any) -> Envelope:
        """Return an envelope published now."""
        now = datetime.fromtimestamp(self.clock.now(), UTC)
        made = Envelope(
            id="7", name="v.paid", version=2, time=now, source="shop", correlation="7", body=b'{"sum": 3}', headers={}
        )
        return made._replace(**facts)

    async def attend(self, attempt: int = 1, **facts: Any) -> Verdict:
        """Attend to a delivery of an envelope."""
        headers, body = binary(self.envelope(**facts))
        return await self.judge(Wire("7", body, headers), attempt)

    async def judge(self, wire: Wire, attempt: int = 1) -> Verdict:
        """Attend to a delivery of a wire."""
        letter = Letter(attempt=attempt)
        letter.wire = wire
        return await self.consumer.attend(letter)


def raises(error: BaseException) -> Action:
    """Return what suspends once and raises."""

    async def action() -> None:
        await checkpoint()
        raise error

    return action


async def test_handled() -> None:
    """A message that is handled without an error is done; both wire forms are understood."""
    desk = Desk()
    assert await desk.attend() == Done()
    assert await desk.judge(Wire("7", structured(desk.envelope()))) == Done()
    assert [(3, 1), (3, 1)] == desk.seen


async def test_failures_are_counted_to_death() -> None:
    """Each failure waits as its policy says, and the last attempt is death with the last error."""
    desk = Desk(raises(ValueError("no")))
    assert [Again(1.0), Again(2.0)] == [await desk.attend(1), await desk.attend(2)]
    assert await desk.attend(3) == Dead("failed 3 times; last: ValueError: no")
    assert [(3, 1), (3, 2), (3, 3)] == desk.seen


async def test_unknown_number_of_deliveries_is_the_first() -> None:
    """Where the transport does not count, every attempt is the first."""
    desk = Desk(raises(ValueError("no")))
    assert await desk.attend(0) == Again(1.0)
    assert [(3, 1)] == desk.seen


async def test_orders_of_the_handler() -> None:
    """Reject is death at once, RetryLater sets the wait, give_up_on is death."""
    assert await Desk(raises(Reject("stolen"))).attend() == Dead("Reject: stolen")
    assert await Desk(raises(RetryLater(77))).attend() == Again(77)
    assert isinstance(await Desk(raises(KeyError()), retry=Retry(give_up_on=(LookupError,))).attend(), Dead)


@pytest.mark.parametrize(
    "wire",
    [
        Wire("7", b""),
        Wire("7", b"{"),
        Wire("7", b"\xff\xfe"),
        Wire("7", b"[]"),
        Wire("7", b"null"),
        Wire("7", b'{"specversion": "1.0"}'),
        Wire("7", b'{"sum": 3}', {"ce-specversion": "1.0"}),
        Wire("7", b'{"sum": 3}', {"CE-SpecVersion": "0.3", "ce-type": "v.paid"}),
        Wire("7", b"[" * 100_000),
    ],
    ids=lambda wire: f"{wire.body[:20]!r} {dict(wire.headers)}",
)
async def test_what_is_no_envelope_is_dead(wire: Wire) -> None:
    """Bytes that are no message of ours die at once, with a reason, and no handler sees them."""
    desk = Desk()
    verdict = await desk.judge(wire)
    assert isinstance(verdict, Dead)
    assert verdict.reason
    assert [] == desk.seen


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"sum": "many"}', b'{"sum": NaN}', b'{"sum": 1, "sum": 2}', b'{"sum": 1e999}', b"3", b"\0"]
)
async def test_body_that_is_none_of_its_type_is_dead(body: bytes) -> None:
    """A body that its type does not accept dies at once, and no handler sees it."""
    desk = Desk()
    assert isinstance(await desk.attend(body=body), Dead)
    assert [] == desk.seen


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), ZeroDivisionError("a bug")], ids=repr)
async def test_error_of_the_codec_is_death_of_the_message_only(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong while decoding, the worker lives and the message is visibly dead."""
    desk = Desk()

    def decode(*_: object) -> None:
        raise error

    monkeypatch.setattr(type(desk.registry.wiring.codec), "decode", decode)
    verdict = await desk.attend()
    assert isinstance(verdict, Dead)
    assert type(error).__name__ in verdict.reason


@pytest.mark.parametrize("facts", [{"name": "v.unheard_of"}, {"version": 3}], ids=repr)
async def test_what_nobody_knows_yet_waits_for_a_deploy(facts: dict[str, Any]) -> None:
    """An unknown name or a newer version is postponed, uncounted, for a day; then it is dead and says why."""
    desk = Desk()
    born = desk.envelope()
    for age in (0, 3600, 86_399):
        desk.clock.jump(age)
        assert await desk.attend(900, time=born.time, **facts) == Postponed(30.0)
    desk.clock.jump(86_400)
    verdict = await desk.attend(900, time=born.time, **facts)
    assert isinstance(verdict, Dead)
    known = UnknownMessageError("v.paid", 3, 2) if "version" in facts else UnknownMessageError("v.unheard_of")
    assert verdict.reason == str(known)
    assert [] == desk.seen


async def test_older_version_is_handled() -> None:
    """A message of an older version is handled as far as its body still fits."""
    assert await Desk().attend(version=1) == Done()


async def test_what_is_not_due_is_postponed() -> None:
    """A delayed message is put off until its time; a millisecond is not worth a journey."""
    desk = Desk()
    due = desk.envelope().time + timedelta(seconds=60)
    assert await desk.attend(due=due) == Postponed(60.0)
    desk.clock.jump(59.9995)
    assert await desk.attend(due=due) == Done()


async def test_delivery_before_its_time_is_no_attempt() -> None:
    """Where the transport itself kept a delayed message, it counted one delivery too many; else it did not."""
    for longest, attempts in ((0.0, [1, 2, 3]), (59.0, [1, 2, 3]), (60.0, [1, 1, 2])):
        desk = Desk(longest=longest)
        born = desk.envelope()
        desk.clock.jump(60)
        for attempt in (1, 2, 3):
            await desk.attend(attempt, time=born.time, due=born.time + timedelta(seconds=60))
        assert attempts == [attempt for _, attempt in desk.seen]


# what handlers raise


class Exit(BaseException):
    """Be an exit of somebody's own."""


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit("gone"), Exit("mine")], ids=repr)
async def test_handler_that_wants_to_leave_has_failed(error: BaseException) -> None:
    """SystemExit and its like are failures of their message; the worker goes on."""
    desk = Desk(raises(error), retry=Retry(attempts=1))
    verdict = await desk.attend()
    assert isinstance(verdict, Dead)
    assert f"the handler raised {type(error).__name__}" in verdict.reason


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), BaseExceptionGroup("", [ValueError(), KeyboardInterrupt()])], ids=repr
)
async def test_keyboard_interrupt_gets_out(error: BaseException) -> None:
    """Somebody at the keyboard ends the process, not the message."""
    with pytest.raises(type(error)) as caught:
        await Desk(raises(error)).attend()
    assert caught.value is error


async def test_handler_that_raises_a_cancellation_of_its_own_has_failed() -> None:
    """A cancellation that nobody asked for is a failure, alone and in a group; in a mixed one the errors count."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await checkpoint()
        except anyio.get_cancelled_exc_class() as error:
            cancelled = error
    for error in (cancelled, BaseExceptionGroup("", [cancelled])):
        desk = Desk(raises(error), retry=Retry(attempts=1))
        assert await desk.attend() == Dead(
            "failed once; last: RuntimeError: the handler raised a cancellation that nobody had asked for"
        )
    mixed = Desk(raises(BaseExceptionGroup("both", [ValueError("no"), cancelled])), retry=Retry(attempts=1))
    verdict = await mixed.attend()
    assert isinstance(verdict, Dead)
    assert "ValueError: no" in verdict.reason
    assert "Cancelled" not in verdict.reason


async def test_group_of_errors_is_one_failure() -> None:
    """An exception group counts as one failure and dies only if all in it is final."""
    policy = Retry(attempts=3, initial=1, jitter=False, give_up_on=(KeyError,))
    mixed = Desk(raises(ExceptionGroup("", [ValueError(), KeyError()])), retry=policy)
    assert await mixed.attend() == Again(1)
    final = Desk(raises(ExceptionGroup("", [KeyError(), KeyError()])), retry=policy)
    assert isinstance(await final.attend(), Dead)


async def test_cancellation_from_outside_is_neither_success_nor_failure() -> None:
    """A handler that is cancelled has no verdict; the cancellation goes on."""
    verdicts = list[Verdict]()
    desk = Desk(anyio.sleep_forever)
    with anyio.move_on_after(0.005) as scope:
        verdicts.append(await desk.attend())
    assert scope.cancelled_caught
    assert [] == verdicts


@pytest.mark.parametrize("kind", ["error", "group", "mixed"])
async def test_error_in_answer_to_a_cancellation_is_no_failure(kind: str) -> None:
    """Whatever a handler makes of its cancellation, no failure is counted: it was cut."""

    async def bitter() -> None:
        try:
            await anyio.sleep_forever()
        except BaseException as error:
            if kind == "mixed":
                raise BaseExceptionGroup("", [ValueError(), error]) from None
            raise (ExceptionGroup("", [ValueError()]) if kind == "group" else ValueError()) from error

    verdicts = list[Verdict]()
    with anyio.move_on_after(0.005):
        verdicts.append(await Desk(bitter).attend())
    assert [Cut()] == verdicts


async def test_handler_that_finishes_in_spite_of_its_cancellation_is_done() -> None:
    """A handler that swallows its cancellation and returns has handled its message."""

    async def stoic() -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            pass

    verdicts = list[Verdict]()
    with anyio.move_on_after(0.005):
        verdicts.append(await Desk(stoic).attend())
    assert [Done()] == verdicts


@asyncio_only
async def test_native_cancellation_is_neither_success_nor_failure() -> None:
    """Asyncio's own cancellation counts no failure either, even if the handler answers with an error."""

    async def bitter() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            raise ValueError

    for action, expected in ((anyio.sleep_forever, asyncio.CancelledError), (bitter, Cut())):
        task = asyncio.create_task(Desk(action).attend())
        await anyio.wait_all_tasks_blocked()
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        assert expected in (outcome, type(outcome))


@asyncio_only
async def test_timeouts_inside_a_handler_do_not_look_like_a_cancellation() -> None:
    """A handler may end parts of itself, asyncio's way or anyio's, and fails afterwards like any other."""

    async def busy() -> None:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.sleep(100)
        except TimeoutError:
            pass
        with anyio.move_on_after(0.001):
            await asyncio.sleep(100)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0)).cancel()
        raise ValueError("late")

    assert await Desk(busy).attend() == Again(1.0)


async def test_handling_leaves_no_context_behind() -> None:
    """What a handler sets does not reach the next one; the queue that it drains is known while it runs."""
    seen = list[Any]()

    async def moves() -> None:
        seen.append((tenant.get(), draining.get()))
        tenant.set("acme")

    desk = Desk(moves)
    await desk.attend()
    await desk.attend()
    assert [("none", "shop/m.paid")] * 2 == seen
    assert ("none", None) == (tenant.get(), draining.get())


class Scripted:
    """Be an invoker that raises."""

    def __init__(self, invoker: Invoker, error: Exception) -> None:
        self.known = invoker.known
        self.error = error

    async def run(self, *_: object) -> None:
        """Raise."""
        raise self.error


async def test_lease_that_is_lost_leaves_nothing_to_settle() -> None:
    """A lost claim, and a commit whose outcome nobody knows, are gone; without a claim it is an error like others."""
    desk = Desk()
    claim = cast("Claim", object())
    for error, given, expected in (
        (SettleError("lost"), claim, Gone()),
        (Lapse(), claim, Gone()),
        (SettleError("somebody else's"), None, Again(1.0)),
    ):
        invoker = cast("Invoker", Scripted(desk.invoker, error))
        consumer = Consumer(desk.registry, invoker, desk.runtime)
        letter = Letter()
        letter.wire = Wire("7", structured(desk.envelope()))
        assert await consumer.attend(letter, given) == expected


async def test_log_says_what_became_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """A failure is a warning in one line; a death is an error with its traceback."""
    desk = Desk(raises(ValueError("line\nbreak")), retry=Retry(attempts=2, initial=1, jitter=False))
    await desk.attend(1)
    await desk.attend(2)
    warning, death = caplog.records
    assert (warning.levelno, death.levelno) == (logging.WARNING, logging.ERROR)
    assert warning.getMessage() == "shop/m.paid failed at attempt 1, again in 1.000 s: ValueError: line break"
    assert death.getMessage() == "shop/m.paid gave up after attempt 2: ValueError: line break"
    assert (warning.exc_info, bool(death.exc_info)) == (None, True)


async def test_long_errors_are_cut() -> None:
    """The reason of a death keeps to the ceiling of Limits."""
    verdict = await Desk(raises(ValueError("x" * 10_000)), retry=Retry(attempts=1)).attend()
    assert isinstance(verdict, Dead)
    assert len(verdict.reason) == Limits().error


# settle


@pytest.mark.parametrize(
    ("verdict", "verbs"),
    [
        (Done(), ["ack"]),
        (Again(3.0), [("retry", 3.0)]),
        (Again(0.0), [("retry", 0.001)]),
        (Postponed(3.0), [("retry", 3.0)]),
        (Postponed(0.0), [("retry", 0.0)]),
        (Dead("why"), [("reject", "why")]),
        (Gone(), []),
        (Cut(), []),
    ],
)
async def test_each_verdict_is_one_verb(verdict: Verdict, verbs: list[Any]) -> None:
    """A verdict is told to the transport in one verb; a counted failure is never handed back as uncounted."""
    letter = Letter()
    kept = await settle(letter, verdict)
    assert verbs == letter.verbs
    assert kept is bool(verbs)


@pytest.mark.parametrize("error", [SettleError("late"), Lost("gone")], ids=repr)
async def test_settling_what_is_somebody_elses(error: Exception) -> None:
    """A lost link or lease at settling is no error of anybody here."""

    class Late(Letter):
        async def ack(self) -> None:
            raise error

    assert not await settle(Late(), Done())
