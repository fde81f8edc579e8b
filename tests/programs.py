"""A program of its own that runs, and the log that it writes."""

import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.servers.server import wait_until


class Program:
    """Be a Python program that runs in a directory, with its log."""

    def __init__(self, *words: str, place: Path, log: Path, env: Mapping[str, str], **options: Any) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=file, cwd=place, env=env, **options
            )

    @property
    def log(self) -> str:
        """Return what it has written so far."""
        return self._log.read_text()

    def says(self, pattern: str, times: int = 1, seconds: float = 60.0) -> list[str]:
        """Wait until it has said something so often; return what was found."""
        wait_until(lambda: self.process.poll() is not None or self._count(pattern) >= times, seconds, lambda: self.log)
        found = re.findall(pattern, self.log)
        assert len(found) >= times, self.log
        return found

    def end(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """End it and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def _count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.log))
