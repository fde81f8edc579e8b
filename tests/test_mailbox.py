"""What has arrived is received in its order, until it is stopped, ended or lost."""

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest

from eventbus._mailbox import Mailbox, Presettled
from eventbus.errors import Lost
from eventbus.transport import Wire


def letters(*ids: str) -> list[Presettled]:
    return [Presettled(Wire(id, b"")) for id in ids]


async def received(mailbox: Mailbox) -> str:
    return (await mailbox.receive()).wire.id


def filled(*ids: str, limit: int = 10) -> Mailbox:
    mailbox = Mailbox(limit)
    for letter in letters(*ids):
        mailbox.put(letter)
    return mailbox


async def lose(mailbox: Mailbox) -> None:
    mailbox.lose("the server is gone")


async def test_order_and_waiting() -> None:
    """Receivers wait for what comes, the oldest first, and one that is cancelled takes nothing with it."""
    mailbox = filled("1", "2")
    assert ["1", "2"] == [await received(mailbox), await received(mailbox)]
    with anyio.move_on_after(0.01):
        await mailbox.receive()
    got: list[str] = []

    async def receive() -> None:
        got.append(await received(mailbox))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        for letter in letters("3", "4"):
            mailbox.put(letter)
    assert sorted(got) == ["3", "4"]


async def test_too_slow() -> None:
    """With the first message too many it is lost, with what was in it; the first reason stays."""
    mailbox = filled("1", "2", limit=2)
    mailbox.put(*letters("3"))
    mailbox.lose("the server is gone")
    mailbox.put(*letters("4"))
    for _ in range(2):
        with pytest.raises(Lost, match="fell more than 2 messages behind"):
            await mailbox.receive()


async def test_end_and_stop() -> None:
    """Ended it gives out what it has, stopped it has nothing more; neither takes anything in."""
    ended, stopped = filled("1"), filled("1")
    ended.end()
    await stopped.stop()
    for mailbox in (ended, stopped):
        mailbox.put(*letters("2"))
    assert await received(ended) == "1"
    for mailbox in (ended, stopped):
        with pytest.raises(anyio.EndOfStream):
            await mailbox.receive()


@pytest.mark.parametrize(
    ("end", "error"),
    [(Mailbox.stop, anyio.EndOfStream), (lose, Lost)],
    ids=["stop", "lose"],
)
async def test_who_waits_is_told(end: Callable[[Mailbox], Coroutine[Any, Any, None]], error: type[Exception]) -> None:
    """All who wait for a message are told of the end."""
    mailbox, told = Mailbox(), list[type[Exception]]()

    async def receive() -> None:
        with pytest.raises(error):
            await mailbox.receive()
        told.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        await end(mailbox)
    assert told == [error, error]


async def test_presettled() -> None:
    """What was settled when it was sent bears every verb, and counts no deliveries."""
    [letter] = letters("1")
    await letter.ack()
    await letter.retry(1.0)
    await letter.reject("no")
    await letter.extend()
    assert letter.attempt == 0
