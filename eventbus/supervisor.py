"""Be a worker process: boot the application without an HTTP server, and end on a signal, in time."""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import anyio

from eventbus.bus import EventBus
from eventbus.channel import Source
from eventbus.clock import Runtime
from eventbus.errors import EventBusError

__all__ = ("LATE", "SIGNALS", "Job", "Target", "find", "work")

LATE = 124
"""The exit code of a process whose drain did not end in time."""
RESERVE = 2.0
"""Seconds after the time to drain in which a process ends by itself, before it is ended."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger("eventbus")


@dataclass(frozen=True, slots=True)
class Target:
    """Hold what ``module:name`` names: a bus, and the application it is installed on if that was named."""

    bus: EventBus
    app: Any = None

    def running(self) -> AbstractAsyncContextManager[object]:
        """Return the lifetime of the bus, within the application's if there is one."""
        if self.app is None:
            return self.bus.running()
        lifetime: AbstractAsyncContextManager[object] = self.app.router.lifespan_context(self.app)
        return lifetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Say what a worker process does."""

    app: str
    only: tuple[str, ...] = ()
    """Handlers, modules or transports; none: all."""
    concurrency: int | None = None
    processes: int = 1
    alive: str | None = None
    """A file that is touched while nothing in the process is stuck."""
    reload: tuple[str, ...] = ()
    """Directories whose Python files start it anew when they change."""


def find(path: str) -> Target:
    """Return the bus, or the application with its bus, that ``module:name`` names; the working directory is searched.

    Raises ``LookupError`` with what to do if there is none.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise LookupError(f"{path!r} names no application: write module:name, such as app.main:bus")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise LookupError(f"there is no module {module_name!r} in {here} or among what is installed") from error
    for part in name.split("."):
        if not hasattr(found, part):
            close = get_close_matches(part, dir(found), n=1)
            raise LookupError(f"{module_name!r} has no {name!r}{f': did you mean {close[0]!r}?' if close else ''}")
        found = getattr(found, part)
    if isinstance(found, EventBus):
        return Target(found)
    bus = getattr(getattr(found, "state", None), "eventbus", None)
    if isinstance(bus, EventBus):
        return Target(bus, found)
    raise LookupError(f"{path!r} is neither an EventBus nor an application on which install(app, bus) was called")


def work(job: Job, follow: bool = False) -> int:
    """Be one worker process, until a signal; return its exit code.

    Args:
        job: what to do.
        follow: whether to end when standard input is closed, as it is however the parent ends.
    """
    target = find(job.app)
    uvloop = find_spec("uvloop") is not None
    with ExitStack() as stack:
        if job.concurrency is not None:
            limits = replace(target.bus.limits, concurrency=job.concurrency)
            stack.enter_context(target.bus.rewired(Runtime(), limits=limits))
        engine = target.bus.engine
        engine.consumes = True
        if job.only:
            engine.only = _chosen(target.bus, job.only)
        if follow:
            threading.Thread(target=_follow_parent, daemon=True).start()
        return anyio.run(_work, target, job.alive, backend_options={"use_uvloop": uvloop})


async def _work(target: Target, alive: str | None) -> int:
    return await _Process(target, alive).run()


class _Process:
    """Be a worker process: one signal drains, a second one ends it at once."""

    def __init__(self, target: Target, alive: str | None) -> None:
        self._target = target
        self._alive = None if alive is None else Path(alive)
        self._stop = anyio.Event()
        self._second = 0
        self._starting = anyio.CancelScope()

    async def run(self) -> int:
        """Run until a signal has come and the drain is over."""
        failure: Exception | None = None
        with anyio.open_signal_receiver(*SIGNALS) as signals:
            async with anyio.create_task_group() as group:
                group.start_soon(self._listen, signals, name="eventbus signals")
                try:
                    with self._starting:
                        async with self._running():
                            await self._stop.wait()
                except Exception as error:  # out of the task group, so that it is not wrapped in a group
                    failure = error
                finally:
                    group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return 128 + self._second if self._second else 0

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        async with self._target.running():
            names = sorted(self._target.bus.health().sources)
            log.info("worker %d runs %d source(s): %s", os.getpid(), len(names), ", ".join(names) or "none")
            async with anyio.create_task_group() as group:
                if self._alive is not None:
                    group.start_soon(self._touch, self._alive, name="eventbus liveness")
                yield
                group.cancel_scope.cancel()
            log.info("worker %d drains", os.getpid())

    async def _listen(self, signals: Any) -> None:
        async for number in signals:
            if not self._stop.is_set():
                self._stop.set()
                _end_in(self._target.bus.limits.drain + RESERVE, LATE, self._late)
                if self._target.bus.engine.state == "not started":
                    self._starting.cancel()
                continue
            self._second = int(number)
            _end_in(RESERVE, 128 + self._second, self._late)
            if self._target.bus.engine.worker is not None:
                self._target.bus.engine.worker.cut()

    async def _touch(self, file: Path) -> None:
        """Touch a file while a restart would mend nothing, and take it away at the end."""
        try:
            while True:
                if self._target.bus.health().alive:
                    await anyio.Path(file).touch()
                await anyio.sleep(self._target.bus.limits.sweep)
        finally:
            file.unlink(missing_ok=True)  # noqa: ASYNC240 - also when cancelled

    def _late(self) -> str:
        worker = self._target.bus.engine.worker
        running = (
            [f"{one.source.name} ({len(one.running)})" for one in worker.channels if one.running] if worker else []
        )
        return ", ".join(running) or "nothing of the bus"


def _end_in(seconds: float, code: int, running: Callable[[], str]) -> None:
    """End this process if it is still there after some seconds: a thread that never returns must not hold it."""

    def end() -> None:
        time.sleep(seconds)
        log.error("worker %d is ended with exit code %d, still running: %s", os.getpid(), code, running())
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def _follow_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _chosen(bus: EventBus, only: Sequence[str]) -> Callable[[Source], bool]:
    """Return what tells which sources belong to some handlers, modules or transports.

    Raises ``LookupError`` for a name that is none of them.
    """
    registry = bus.engine.registry
    handlers = [known.handler.name for known in registry.known]
    modules = [module.name for module in registry.wiring.modules]
    for name in only:
        if name not in {*handlers, *modules, *registry.wiring.transports}:
            close = get_close_matches(name, [*handlers, *modules], n=1)
            raise LookupError(
                f"--only {name}: no handler, module or transport{f': did you mean {close[0]}?' if close else ''}"
            )
    wanted = {name for name in handlers if name in only or name.partition(".")[0] in only}
    topics = {
        subject.spec.name
        for subject in registry.subjects.values()
        if any(known.handler.name in wanted for known in subject.routed)
    }

    def takes(source: Source) -> bool:
        _, _, queue = source.name.rpartition("@")
        if source.remaining is not None:  # what waits in this process's memory is handled by nobody else
            return True
        if ">" in queue:
            return queue.partition(">")[2] in only
        return queue.partition("/")[2] in wanted or (
            queue == registry.owner and source.name.partition("@")[0] in topics
        )

    return takes


def _main() -> NoReturn:
    told: dict[str, Any] = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        told["only"] = tuple(told["only"])
        code = work(Job(**told), follow=True)
    except (LookupError, EventBusError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - the sentence says it
        code = 2 if isinstance(error, LookupError) else 1
    sys.exit(code)


if __name__ == "__main__":
    _main()
