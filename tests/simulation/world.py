"""The world of one simulated run: its time, its chance, its faults, its processes and the log of every step."""

from collections import Counter
from random import Random
from typing import Any

import anyio
import trio

from eventbus.clock import Runtime
from tests.simulation.broker import Broker
from tests.simulation.database import Database
from tests.simulation.oracle import Oracle, Violation

__all__ = ("EPOCH", "Process", "ProcessClock", "World")

EPOCH = 1_800_000_000.0
MOST_STEPS = 60_000
"""Steps after which a run goes in circles."""


class ProcessClock:
    """Tell one process the time: its wall clock may be wrong, and nothing rings while it is frozen."""

    def __init__(self, process: "Process", skew: float) -> None:
        self._process = process
        self._skew = skew

    def now(self) -> float:
        """Return the wall-clock time of this process's machine."""
        return EPOCH + trio.current_time() + self._skew

    def monotonic(self) -> float:
        """Return virtual seconds since the world began."""
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        """Wait in virtual time, and until the process is not frozen."""
        await anyio.sleep(seconds)
        await self._process.gate()

    def move_on_after(self, seconds: float) -> anyio.CancelScope:
        """Return a scope in virtual time."""
        return anyio.move_on_after(seconds)


class Process:
    """Be one incarnation of one process."""

    def __init__(self, world: "World", host: str, number: int) -> None:
        self.world = world
        self.host = host
        self.name = f"{host}{number}"
        self.alive = True
        self.consumes = True
        self.up = False
        self.over = anyio.Event()
        """Set when nothing of it runs any more."""
        self.gone = anyio.Event()
        """Set when the host may start another one."""
        self.stopping = anyio.Event()
        self.told: float | None = None
        """When it was told to stop."""
        self.scope = anyio.CancelScope()
        self.requests: set[anyio.CancelScope] = set()
        self.bus: Any = None
        self.engine: Any = None
        self.random = Random(f"{world.seed} {self.name}")
        self._ids = 0
        self._thaw: anyio.Event | None = None
        self.runtime = Runtime(ProcessClock(self, world.skews[host]), self.new_id, self.random)

    def new_id(self) -> str:
        """Return an id that no other incarnation makes."""
        self._ids += 1
        return f"{self.name}-{self._ids}"

    @property
    def frozen(self) -> bool:
        """Tell whether it stands still."""
        return self._thaw is not None

    @property
    def works(self) -> bool:
        """Tell whether it can take work now."""
        return self.alive and self.up and not self.frozen and not self.stopping.is_set()

    async def gate(self) -> None:
        """Let nothing pass in or out while frozen."""
        while self._thaw is not None:
            await self._thaw.wait()

    def stop(self) -> None:
        """Ask it to stop, as SIGTERM does."""
        if self.told is None:
            self.told = trio.current_time()
        self.stopping.set()

    def freeze(self) -> None:
        """Stand still, as under SIGSTOP."""
        self._thaw = self._thaw or anyio.Event()

    def thaw(self) -> None:
        """Go on."""
        if self._thaw is not None:
            event, self._thaw = self._thaw, None
            event.set()

    def crash(self) -> None:
        """End at once: whatever its tasks still do reaches nobody, and what it had open is rolled back."""
        if not self.alive:
            return
        self.alive = False
        self.world.oracle.crashed(self)
        self.world.database.disconnect(self)
        self.world.broker.disconnect(self)
        self.thaw()
        if self.engine is not None and self.engine.worker is not None:
            self.engine.worker.cut()
        self.scope.cancel()
        self.gone.set()

    def handling(self) -> Counter[str]:
        """Count, per source, what is in the slots: running, or not settled yet."""
        worker = None if self.engine is None else self.engine.worker
        channels = () if worker is None else worker.channels
        return Counter({channel.source.name: len(channel.running) for channel in channels})


class World:
    """Hold everything that exists once per run."""

    def __init__(self, seed: int, random: Random, traits: Any) -> None:
        self.seed = seed
        self.random = random
        self.traits = traits
        self.limits = traits.limits
        self.log: list[str] = []
        self.steps = 0
        self.store_skew = 0.0
        self.ahead = False
        """Whether the clock was set forward, and nobody has swept since, so that none knows what it showed."""
        self.troubled = 0.0
        """When something last went wrong that excuses a delay."""
        self.faulty = True
        """Whether faults may still happen."""
        self.outages: Counter[str] = Counter()
        self.skews = {host: random.choice((0.0, 0.0, 0.4, -0.4, 300.0, -300.0)) for host in traits.hosts}
        self.oracle = Oracle(self)
        self.database = Database(self)
        self.broker = Broker(self)
        self.processes: list[Process] = []
        self.root = anyio.CancelScope()
        self.closing = False
        self.violation: Violation | None = None
        self.cancel_at = {random.randrange(400) for _ in range(traits.cancels)}

    def now(self) -> float:
        """Return the time of the store's clock."""
        return EPOCH + trio.current_time() + self.store_skew

    def monotonic(self) -> float:
        """Return virtual seconds since the world began."""
        return trio.current_time()

    async def sleep(self, seconds: float) -> None:
        """Wait in virtual time."""
        await anyio.sleep(seconds)

    def move_on_after(self, seconds: float) -> anyio.CancelScope:
        """Return a scope in virtual time."""
        return anyio.move_on_after(seconds)

    def note(self, who: str, what: str) -> None:
        """Write a step into the log, and count it."""
        self.steps += 1
        self.log.append(f"{self.steps} {trio.current_time():.4f} {who} {what}")
        if self.steps > MOST_STEPS:
            self.violated(Violation("the run goes in circles"))
        if self.steps in self.cancel_at and self.faulty:
            for process in self.processes:
                for request in list(process.requests):
                    request.cancel()

    def violated(self, violation: Violation) -> None:
        """End the run: the first violation is its result, whoever catches it on its way."""
        if self.violation is None:
            self.violation = violation
            self.log.append(f"{self.steps} {trio.current_time():.4f} {violation}")
            self.root.cancel()
        raise violation

    def trouble(self) -> None:
        """Note that something goes wrong now."""
        self.troubled = max(self.troubled, trio.current_time())

    def fault(self, kind: str) -> str | None:
        """Return whether the call that begins now fails, and when: "before" its effect or "after" it."""
        if self.outages[kind]:
            self.trouble()
            return "before"
        if not self.faulty or self.random.random() >= self.traits.errors:
            return None
        self.trouble()
        return self.random.choice(("before", "after"))

    async def latency(self) -> None:
        """Take the time that a way to another machine takes: some, only a turn of the event loop, or none."""
        chance = self.random.random()
        if chance < self.traits.latency:
            await trio.sleep(self.random.random() * 0.1)
        elif chance < 0.6:
            await trio.lowlevel.checkpoint()

    def working(self) -> list[Process]:
        """Return the processes that can take work now."""
        return [process for process in self.processes if process.works and process.consumes]

    def jump(self, seconds: float) -> None:
        """Set the store's clock forward, or back."""
        self.store_skew += seconds
        self.ahead = self.ahead or seconds > 0
        self.trouble()
        self.oracle.jumped(seconds)
