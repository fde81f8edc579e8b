"""The lines about handlings: their facts, no bodies unless asked for, and nothing that could forge another line."""

import logging
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from pydantic import ValidationError

from eventbus import Command, Context, Event, EventBus, Module, Reject, Retry, RetryLater
from eventbus.middlewares.logging import Logging
from eventbus.testing import harness

EVIL = "x\r\nINFO forged \x1b[2J\x1b]0;title\x07 \u2028 \u202e \x85 %s %(body)s"


class Paid(Event, name="t.paid"):
    """State that something was paid."""

    account: str = "a"
    card: str = "4111"


class Charge(Command[int], name="t.charge"):
    """Ask for money."""

    card: str = "4111"


class Ticks:
    """Be a clock that goes on by a quarter of a second at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.25
        return self.now


def shop(action: Any, routes: Any = None, **options: Any) -> EventBus:
    """Return a bus with one handler of each kind, which do as they are told."""
    module = Module("m")

    @module.on(Paid, retry=Retry(attempts=2, initial=1, jitter=False))
    async def paid(event: Paid, ctx: Context) -> None:
        action(event, ctx)

    @module.handles(Charge)
    async def charge(command: Charge) -> int:
        action(command, None)
        return 1

    return EventBus(module, routes=routes, middleware=[Logging(clock=Ticks(), **options)])


def fails(error: BaseException) -> Any:
    """Return what raises an error."""

    def action(*_: object) -> None:
        raise error

    return action


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Iterator[list[Any]]:
    """Return what is logged about handlings."""
    kept: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("eventbus.handling")
    handler.emit = kept.append
    caplog.set_level(logging.DEBUG, "eventbus.handling")
    logger.addHandler(handler)
    yield kept
    logger.removeHandler(handler)


async def test_one_line_with_the_facts(records: list[Any]) -> None:
    """A handling is one line, whose facts are fields as well."""
    seen: list[Context] = []
    receipt = await shop(lambda _, ctx: seen.append(ctx)).publish(Paid())
    (record,) = records
    assert (logging.INFO, "eventbus.handling") == (record.levelno, record.name)
    facts = {
        "message_name": "t.paid", "message_id": receipt.id, "handler": "m.paid", "attempt": 1, "outcome": "done",
        "ms": 250.0, "correlation_id": seen[0].correlation_id, "error": None, "body": None,
    }  # fmt: skip
    assert facts == {name: getattr(record, name) for name in facts}
    assert (
        f"t.paid {receipt.id} m.paid attempt 1 done in 250.000 ms, correlation {seen[0].correlation_id}"
        == record.getMessage()
    )


@pytest.mark.parametrize(
    ("error", "outcome", "level"),
    [
        (ValueError("no"), "failed", logging.WARNING),
        (Reject("never"), "rejected", logging.WARNING),
        (RetryLater(5), "postponed", logging.INFO),
    ],
)
async def test_failures(error: Exception, outcome: str, level: int, records: list[Any]) -> None:
    """What a handler raises is told by its kind and text, and goes on."""
    with pytest.raises(type(error)):
        await shop(fails(error)).send(Charge())
    (record,) = records
    assert (outcome, level) == (record.outcome, record.levelno)
    assert f", error: {type(error).__name__}" in record.getMessage()


async def test_cause_of_an_error_without_text(records: list[Any]) -> None:
    """An error that says nothing is told by its cause."""

    def action(*_: object) -> None:
        raise LookupError from ValueError("the reason")

    with pytest.raises(LookupError):
        await shop(action).send(Charge())
    assert records[0].error == "LookupError: ValueError: the reason"


async def test_cancelled(records: list[Any]) -> None:
    """A handling that is cancelled neither failed nor succeeded."""
    module = Module("m")

    @module.handles(Charge)
    async def charge(command: Charge) -> int:
        await anyio.sleep_forever()
        return 1

    with anyio.move_on_after(0):
        await EventBus(module, middleware=[Logging()]).send(Charge())
    assert [("cancelled", None, logging.INFO)] == [(one.outcome, one.error, one.levelno) for one in records]


async def test_attempts(records: list[Any]) -> None:
    """Every attempt has a line of its own, all with the id of the message."""
    bus = shop(fails(ValueError("no")), {Paid: "memory"})
    async with harness(bus) as t:
        receipt = await t.publish(Paid())
        await t.advance(5)
        assert t.dead
        assert t.failed("m.paid")
    found = [(one.attempt, one.outcome, one.message_id) for one in records]
    assert [(1, "failed", receipt.id), (2, "failed", receipt.id)] == found


async def test_nothing_forges_a_line(records: list[Any]) -> None:
    """No name, error or body begins another line, steers a terminal or is read as a format."""
    module = Module("m")

    @module.on(Paid, name="m.evil")
    async def paid(event: Paid) -> None:
        raise ValueError(EVIL + "\ud800")

    def action(ctx: Context) -> Context:
        return Context.of(ctx.message, handler=EVIL)

    async def renames(ctx: Context, call_next: Any) -> Any:
        return await call_next(action(ctx))

    bus = EventBus(module, middleware=[renames, Logging(body=lambda event: event.account)])
    with pytest.raises(ExceptionGroup):
        await bus.publish(Paid(account=EVIL))
    (record,) = records
    for text in (record.getMessage(), record.handler, record.error, record.body):
        assert text.isprintable()
    assert record.getMessage().count(r"x\r\nINFO forged \x1b[2J\x1b]0;title\x07 \u2028 \u202e \x85") == 3
    assert "%s %(body)s" in record.error


async def test_no_body_unless_asked_for(records: list[Any]) -> None:
    """What a message holds is in no line and in no field, not even through Pydantic's own errors."""

    def action(*_: object) -> None:
        Paid.model_validate({"account": ["4111"]})

    with pytest.raises(ValidationError):
        await shop(action).send(Charge())
    assert "4111" not in repr(vars(records[0])) + records[0].getMessage()
    assert "ValidationError: Paid: account: Input should be a valid string" in records[0].getMessage()


async def test_body_as_redacted(records: list[Any]) -> None:
    """Who asks for bodies says what is shown of them."""
    await shop(lambda *_: None, body=lambda message: message.model_dump(exclude={"card"})).publish(Paid())
    assert records[0].body == "{'account': 'a'}"
    assert records[0].getMessage().endswith(", body: {'account': 'a'}")
    assert "4111" not in repr(vars(records[0]))


async def test_redaction_that_fails(records: list[Any]) -> None:
    """A redaction that fails does not fail the handling, and shows nothing."""
    await shop(lambda *_: None, body=lambda message: message.nonesuch).publish(Paid())
    assert records[0].body == "(AttributeError while it was read)"


async def test_long_texts_are_cut(records: list[Any]) -> None:
    """Of errors and bodies so many characters are kept."""
    with pytest.raises(ValueError, match="yyy"):
        await shop(fails(ValueError("y" * 99)), limit=20, body=lambda _: "z" * 99).send(Charge())
    assert (20, 20) == (len(records[0].error), len(records[0].body))


async def test_logger_and_level(caplog: pytest.LogCaptureFixture) -> None:
    """Lines go where they are sent, and what nobody wants is not made."""
    logger, read = logging.getLogger("t.lines"), list[object]()
    bus = shop(lambda *_: None, logger=logger, level=logging.DEBUG, body=read.append)
    caplog.set_level(logging.INFO, "t.lines")
    await bus.publish(Paid())
    assert ([], []) == (caplog.records, read)
    caplog.set_level(logging.DEBUG, "t.lines")
    await bus.publish(Paid())
    assert [("t.lines", logging.DEBUG)] == [(one.name, one.levelno) for one in caplog.records]
