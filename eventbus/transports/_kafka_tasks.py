"""Own what a client library does: a caller may be cut at any time, the library never in the middle."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import anyio

from eventbus.errors import Lost

__all__ = ("Tasks",)

T = TypeVar("T")


class Tasks:
    """Hold the tasks of one opening of a transport; ``end`` leaves none behind."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, job: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run a job in a task of its own."""
        task = asyncio.get_running_loop().create_task(job, name=f"eventbus kafka {name}")
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def run(self, job: Coroutine[Any, Any, T], name: str) -> T:
        """Run a job in a task of its own and return what it returns; cancelling the caller does not cut it."""
        task = self.start(job, name)
        return await self.outcome(task)

    async def outcome(self, task: asyncio.Task[T]) -> T:
        """Wait for a task and return what it returns; the end of the transport, which cuts it, is a loss to others."""
        await asyncio.wait([task])
        if task.cancelled():
            raise Lost("the kafka transport was closed")
        return task.result()

    async def finish(self, job: Coroutine[Any, Any, None], name: str) -> None:
        """Run a job like ``run``, and have also a caller wait for it whose scope was cancelled."""
        with anyio.CancelScope(shield=True):
            await self.run(job, name)

    async def end(self, seconds: float) -> None:
        """Wait for all tasks but this one, and cancel what has not ended by then."""
        rest = self._tasks - {asyncio.current_task()}
        if not rest:
            return
        _, late = await asyncio.wait(rest, timeout=seconds)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=0.1)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # an abandoned job has nobody else to look at it
