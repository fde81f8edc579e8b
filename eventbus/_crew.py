"""Keep several worker processes: start again what dies, and in development all of them when a file changes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from eventbus.supervisor import SIGNALS, Job

__all__ = ("supervise",)

PATIENCE = (0.5, 30.0)
"""The shortest and the longest time in seconds before a process that died is started again."""
LOOK = 0.5
"""Seconds between two looks at the files."""
SKIPPED = ("__pycache__", "node_modules")

log = logging.getLogger("eventbus")


def supervise(job: Job) -> int:
    """Keep as many worker processes as the job says, until a signal; return the worst of their exit codes.

    Each is a new interpreter. One that dies is started again, after a pause that doubles while it lives less than half
    a minute; one that cannot start at all ends them all. With ``reload`` all of them drain and start anew when a file
    changes, and one that cannot start waits for that.
    """
    return _Crew(job).run()


class _Crew:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._stopping = 0
        self._staff: dict[int, subprocess.Popen[bytes]] = {}
        self._begun: dict[int, float] = {}
        self._pauses: dict[int, float] = {}
        self._early: dict[int, int] = {}
        self._files = _files(job.reload)
        self._changed = False
        self._look = 0.0

    def run(self) -> int:
        for number in SIGNALS:
            signal.signal(number, self._signalled)
        for place in range(self._job.processes):
            self._start(place)
        codes: list[int] = []
        while self._staff or self._pauses or (self._job.reload and not self._stopping):
            for place, process in list(self._staff.items()):
                code = process.poll()
                if code is not None:
                    self._ended(place, code, codes)
            for place, due in list(self._pauses.items()):
                if self._stopping or time.monotonic() >= due:
                    del self._pauses[place]
                    if not self._stopping:
                        self._start(place)
            self._reload()
            time.sleep(0.05)
        return max((128 - code if code < 0 else code for code in codes), default=0)

    def _start(self, place: int) -> None:
        alive = f"{self._job.alive}.{place}" if self._job.alive and self._job.processes > 1 else self._job.alive
        told = json.dumps(asdict(replace(self._job, alive=alive, processes=1, reload=())))
        self._begun[place] = time.monotonic()
        self._staff[place] = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "eventbus.supervisor", told],
            stdin=subprocess.PIPE,  # the child ends when this is closed, which it is however this process ends
            process_group=0,  # Ctrl+C is for this process, which tells the others
        )

    def _ended(self, place: int, code: int, codes: list[int]) -> None:
        process = self._staff.pop(place)
        if process.stdin is not None:
            process.stdin.close()
        if self._stopping:
            codes.append(0 if code == -signal.SIGTERM else code)  # it had not begun
        elif self._changed:
            log.info("worker %d is gone", process.pid)
        elif code in (1, 2, 3) and self._job.reload:
            log.warning("worker %d cannot work: the next one starts when a file changes", process.pid)
        elif code in (1, 2, 3):  # it said itself why it cannot work: so would the next one
            codes.append(code)
            self._signalled(signal.SIGTERM, None)
        else:
            early = time.monotonic() - self._begun[place] < PATIENCE[1]
            self._early[place] = self._early.get(place, 0) + 1 if early else 1
            pause = min(PATIENCE[1], PATIENCE[0] * 2.0 ** min(9, self._early[place] - 1))
            log.warning("worker %d ended with %d, the next one starts in %.1f s", process.pid, code, pause)
            self._pauses[place] = time.monotonic() + pause

    def _signalled(self, number: int, _frame: object) -> None:
        self._stopping += 1
        self._tell(number)

    def _tell(self, number: int) -> None:
        for process in self._staff.values():
            process.send_signal(number)

    def _reload(self) -> None:
        """Drain all when a file has changed, and start all when they are gone."""
        if not self._job.reload or self._stopping:
            return
        if self._changed and not self._staff:
            self._changed, self._files = False, _files(self._job.reload)  # before it imports them
            self._pauses.clear()
            self._early.clear()
            for place in range(self._job.processes):
                self._start(place)
        elif not self._changed and time.monotonic() >= self._look:
            self._look = time.monotonic() + LOOK
            found = _files(self._job.reload)
            if changed := sorted(path for path, _ in found.items() ^ self._files.items()):
                log.info("%s changed: all workers drain and start anew", changed[0])
                self._changed = True
                self._tell(signal.SIGTERM)


def _files(directories: Sequence[str]) -> Mapping[str, int]:
    """Return each Python file below some directories with the time of its last change."""
    found: dict[str, int] = {}
    for directory in directories:
        for folder, inner, names in os.walk(directory):
            inner[:] = [name for name in inner if not _is_foreign(Path(folder, name))]
            for file in (Path(folder, name) for name in names if name.endswith(".py")):
                with suppress(FileNotFoundError):  # taken away meanwhile, which is a change as well
                    found[str(file)] = file.stat().st_mtime_ns
    return found


def _is_foreign(directory: Path) -> bool:
    """Tell whether what is in a directory was not written by those who work on the application."""
    return directory.name in SKIPPED or directory.name.startswith(".") or (directory / "pyvenv.cfg").exists()
