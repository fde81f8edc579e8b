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

    def __init__(
        self, *words: str, place: Path, log: Path, env: Mapping[str, str], patience: float = 60.0, **options: Any
    ) -> None:
        self._log = log
        self._patience = patience
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=file, cwd=place, env=env, **options
            )

    @property
    def log(self) -> str:
        """Return what it has written so far."""
        return self._log.read_text()

    def says(self, pattern: str, times: int = 1) -> list[str]:
        """Wait until it has said something so often; return what was found."""
        wait_until(
            lambda: self.process.poll() is not None or self._count(pattern) >= times, self._patience, lambda: self.log
        )
        found = re.findall(pattern, self.log)
        assert len(found) >= times, self.log
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(self._patience)

    def _count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.log))
