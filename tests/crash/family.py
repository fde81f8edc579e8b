"""Start children quickly: from a process that has imported everything, and that never ran anything."""

import multiprocessing
import signal
from collections.abc import Awaitable, Callable
from multiprocessing.process import BaseProcess
from typing import Any

from tests.crash import child
from tests.crash.child import Part
from tests.crash.site import Site
from tests.servers.server import wait_until

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.crash.child",
        "aiosqlite",
        "asyncmy",
        "psycopg",
        "sqlalchemy.dialects.postgresql",
        "sqlalchemy.dialects.mysql",
    ]
)


class Family:
    """Start the children of one site, and see to their end."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._children: list[BaseProcess] = []

    def start(self, **part: Any) -> BaseProcess:
        """Start a child with a part."""
        return self.run(child.play, Part(directory=self.site.directory, store=self.site.store, **part))

    def run(self, play: Callable[[Any], Awaitable[None]], part: Any) -> BaseProcess:
        """Start a child that plays any part."""
        process = FORKS.Process(target=child.main, args=(play, self.site.directory, part), daemon=True)
        process.start()
        self._children.append(process)
        return process

    def started(self, **part: Any) -> BaseProcess:
        """Start a child and wait until its bus runs, or it has ended."""
        process = self.start(**part)
        wait_until(lambda: not process.is_alive() or self.runs(process), 30, "a child did not come up")
        return process

    def runs(self, process: BaseProcess) -> bool:
        """Tell whether the bus of a child runs, or ran."""
        return [str(process.pid)] in self.site.lines("ready.txt")

    def end(self, process: BaseProcess, seconds: float = 60.0, *, kill: bool = False) -> int:
        """Wait for a child, kill it afterwards if asked to, and return its exit code; its complaints are a failure."""
        process.join(seconds)
        if kill and process.is_alive():
            process.kill()
            process.join(10)
        complaints = self.complaints(process)
        assert process.exitcode in (0, -signal.SIGKILL), f"{process.exitcode}: {complaints}"
        assert "Traceback" not in complaints, complaints
        code: int = process.exitcode
        return code

    def complaints(self, process: BaseProcess) -> str:
        """Return what a child has written to its standard error."""
        path = self.site.directory / f"{process.pid}.err"
        return path.read_text() if path.exists() else ""

    def finish(self, seconds: float = 120.0, **part: Any) -> None:
        """Let a last child do all that waits."""
        assert self.end(self.start(**part), seconds) == 0

    def end_all(self) -> None:
        """Kill those that are left, also those that stand still."""
        for process in self._children:
            process.kill()
            process.join(10)
            process.close()
