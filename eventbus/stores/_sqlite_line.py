"""Do on one SQLite connection, in one thread, what waits in the queue in front of it.

What waits is committed together: one BEGIN, one COMMIT, and only then all answers; if one of it fails, each alone. Who
needs a transaction of its own holds the line meanwhile. The thread never waits for the event loop, so nothing that
happens there (a cancellation, its end) can keep the line held.
"""

import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import anyio

from eventbus._loop import poster
from eventbus.errors import StoreError, WrongLoopError
from eventbus.stores._sqlite_file import File, is_busy
from eventbus.stores._sqlite_rows import Rows

__all__ = ("Hold", "Job", "Line", "Verb")

T = TypeVar("T")
Verb = Callable[[Rows, int], T]
"""What is to be done: on which rows, at which millisecond."""


class Job:
    """Be one thing to do, and what came of it."""

    __slots__ = ("abandoned", "error", "event", "now", "part", "result", "undo", "verb")

    def __init__(
        self,
        verb: Verb[Any],
        now: int | None = None,
        undo: Callable[[Any], object] | None = None,
        part: Literal["own", "vital", "end"] = "vital",
    ) -> None:
        self.verb = verb
        self.now = now
        self.undo = undo
        self.part = part
        """Its part in a transaction: the user's own statement, one whose failure fails the whole, or the end of it."""
        self.event: anyio.Event
        """Set when it is answered; shared by all that are committed together."""
        self.result: Any = None
        self.error: BaseException | None = None
        self.abandoned = False

    def run(self, rows: Rows) -> None:
        """Do it, at the time it was given or else at this machine's."""
        self.result = self.verb(rows, time.time_ns() // 1_000_000 if self.now is None else self.now)

    async def wait(self) -> Any:
        """Wait for the answer. Who stops waiting before it has begun has it not done at all."""
        try:
            await self.event.wait()
        except BaseException:
            self.abandoned = True
            if self.event.is_set():
                self.take_back()
            raise
        if self.error is not None:
            raise self.error
        return self.result

    def take_back(self) -> None:
        """Undo what nobody waited for."""
        if self.undo is not None and self.error is None:
            self.undo(self.result)


class Group:
    """Be some jobs that are committed and answered together."""

    __slots__ = ("event", "jobs")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.jobs: list[Job] = []

    def add(self, job: Job) -> None:
        """Take one more in."""
        job.event = self.event
        self.jobs.append(job)

    def answer(self) -> None:
        """Hand over what came of them, in the event loop."""
        self.event.set()
        for job in self.jobs:
            if job.abandoned:
                job.take_back()


class Hold:
    """Be one transaction that has the line to itself, from its first statement to its end."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._over: BaseException | None = None

    def put(self, job: Job | None) -> None:
        """Have something done in it; None rolls it back, which needs nobody to wait. Raises if it is over."""
        group = None if job is None else Group()
        if group is not None and job is not None:
            group.add(job)
        with self._lock:
            if self._over is None:
                self._inbox.put(group)
            elif group is not None:
                raise self._over

    def take(self, timeout: float) -> Group | None:
        """Return what is to be done next. Raises ``queue.Empty`` after ``timeout`` seconds."""
        return self._inbox.get(timeout=timeout)

    def end(self, why: BaseException) -> list[Group]:
        """Take nothing more; return what came too late."""
        with self._lock:
            self._over = why
            late = [self._inbox.get() for _ in range(self._inbox.qsize())]
        return [group for group in late if group is not None]


class Line:
    """Be one thread with one connection and a queue in front; ``begin`` is how its transactions begin."""

    def __init__(self, file: File, begin: str) -> None:
        self._file = file
        self._begin = begin
        self._queue: queue.SimpleQueue[Group | Hold | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._filling: Group | None = None
        """The group at the end of the queue, unless the thread has taken it."""
        self._tell = poster()
        self._home = (os.getpid(), threading.get_ident())
        self._holds: set[Hold] = set()
        self._closed = anyio.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"eventbus {file.path.name}", daemon=True)
        self.rows: Rows

    @property
    def is_open(self) -> bool:
        """Tell whether it takes something to do, in this process."""
        return not self._closing and self._home[0] == os.getpid()

    async def open(self) -> None:
        """Open the connection in the thread. Raises ``StoreError``."""
        self._thread.start()
        await self.call(lambda rows, now: rows.refresh(), None)

    async def close(self) -> None:
        """Finish what waits, roll back what is held, close the connection and end the thread."""
        self.stop()
        if self._home[0] == os.getpid():
            with anyio.CancelScope(shield=True):
                await self._closed.wait()
            self._thread.join()

    def stop(self) -> None:
        """Begin to close; nobody needs to wait for the end of it."""
        if self.is_open:
            self._closing = True
            for hold in self._holds:
                hold.put(None)
            self._queue.put(None)

    async def call(self, verb: Verb[T], now: int | None, undo: Callable[[T], object] | None = None) -> T:
        """Have a verb done, committed together with what else waits; ``undo`` what came of it if nobody waits."""
        job = Job(verb, now, undo)
        self.put(job)
        result: T = await job.wait()
        return result

    def put(self, job: Job) -> None:
        """Queue something to be done."""
        self.check()
        with self._lock:
            group = self._filling
            if group is None or len(group.jobs) >= self._file.limits.batch:
                group = self._filling = Group()
                self._queue.put(group)
            group.add(job)

    def hold(self) -> Hold:
        """Ask for the line, for a transaction."""
        self.check()
        hold = Hold()
        with self._lock:
            self._filling = None
            self._queue.put(hold)
        self._holds.add(hold)
        return hold

    def let_go(self, hold: Hold) -> None:
        """Roll a transaction back if it has not ended; nobody needs to wait for it."""
        hold.put(None)
        self._holds.discard(hold)

    def check(self) -> None:
        """Raise ``WrongLoopError`` anywhere but in the thread where it was opened, ``StoreError`` when it is closed."""
        if self._home != (os.getpid(), threading.get_ident()):
            place = "another thread" if self._home[0] == os.getpid() else "a forked process"
            raise WrongLoopError("using the SQLite store", place)
        if self._closing:
            raise StoreError(f"the store of {self._file.path} is closed")

    # what follows runs in the thread

    def _run(self) -> None:
        try:
            self.rows = Rows(self._file.open(), self._file.limits)
        except Exception as error:
            while (item := self._queue.get()) is not None:
                if isinstance(item, Group):
                    self._fail(item.jobs, error)
                    self._tell(item.answer)
        else:
            self._serve()
            self.rows.connection.close()
        self._tell(self._closed.set)

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Hold):
                self._serve_hold(item)
                continue
            with self._lock:
                if self._filling is item:
                    self._filling = None
            self._together(item.jobs)
            self._tell(item.answer)

    def _together(self, jobs: Sequence[Job]) -> None:
        """Commit some jobs together; if anything of it fails, each alone, so that nobody suffers for a neighbour.

        A savepoint for each would do the same, and cost every verb that does not fail a third more.
        """
        try:
            self._file.patiently(lambda: self._attempt(jobs), lambda: self._closing)
        except Exception as error:
            if len(jobs) == 1 or isinstance(error, StoreError) or is_busy(error):
                self._fail(jobs, error)
                return
            for job in jobs:
                self._together([job])

    def _attempt(self, jobs: Sequence[Job]) -> None:
        try:
            self._start()
            for job in jobs:
                if not job.abandoned:
                    job.run(self.rows)
            self.rows.connection.execute("COMMIT")
            self._file.check()
        except BaseException:
            self._roll_back()
            raise

    def _serve_hold(self, hold: Hold) -> None:
        """Serve one transaction alone until it ends, is let go, or nothing is heard of it for as long as a lease."""
        over: BaseException = StoreError("this transaction was rolled back")
        begun = False
        while True:
            try:
                group = hold.take(self._file.limits.lease)
            except queue.Empty:
                text = f"this transaction kept everybody waiting for {self._file.limits.lease:g} s and was rolled back"
                over = StoreError(text)
                break
            if group is None:
                break
            (job,) = group.jobs
            if job.part == "end" and job.abandoned:
                break
            try:
                if not begun:
                    self._file.patiently(self._start, lambda: self._closing)
                    begun = True
                self._in_hold(job)
            except BaseException as error:
                job.error = self._file.name(error, own=job.part == "own")
                if job.part != "own" or not begun:
                    over = job.error
            self._tell(group.answer)
            if job.part == "end" or over is job.error:
                break
        self._roll_back()
        for late in hold.end(over):
            self._fail(late.jobs, over)
            self._tell(late.answer)

    def _in_hold(self, job: Job) -> None:
        connection = self.rows.connection
        if not connection.in_transaction:
            raise StoreError(f"{self._file.path}: the database has rolled this transaction back")
        job.run(self.rows)
        if job.part == "end":
            connection.execute("COMMIT")
            self._file.check()

    def _start(self) -> None:
        self._file.check()
        if self.rows.connection.in_transaction:  # an earlier rollback has failed
            self.rows.connection.execute("ROLLBACK")
        self.rows.connection.execute(self._begin)
        self.rows.begun()

    def _roll_back(self) -> None:
        self.rows.undone()
        with contextlib.suppress(sqlite3.Error):
            if self.rows.connection.in_transaction:
                self.rows.connection.execute("ROLLBACK")

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            job.error = self._file.name(error)
