"""Run one server as a child process that a test may stop, kill and start again on its port and its data."""

import contextlib
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HOST = "127.0.0.1"
PROC = Path("/proc/self").parent


class AbsentError(Exception):
    """Say which server is not there, and how to get it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Say where a server lives: its directory, its port, and how many ports behind it are its own too."""

    directory: Path
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Say how a server is made, started, greeted and ended."""

    name: str
    url: str
    """With ``{port}``."""
    prepare: Callable[[Place], Iterable[Sequence[str]]] = lambda place: ()
    """Writes what the server needs and returns the commands that make its data; once."""
    command: Callable[[Place], Sequence[str]]
    environment: Callable[[Place], dict[str, str]] = lambda place: {}
    farewell: Callable[[Place], Sequence[str]] | None = None
    """Returns the command that ends what the server left running; once, at the end."""
    hello: bytes = b""
    answer: bytes
    """The pattern that the first bytes after ``hello`` match as soon as the server works."""
    ending: signal.Signals = signal.SIGTERM
    ports: int = 1
    unprivileged: bool = False
    """It refuses to run as root, so that root runs it as nobody."""
    patience: float = 60.0


class Server:
    """Be one server: ``url`` says where it is, ``start`` waits until it answers.

    Where the variable ``EVENTBUS_TEST_<NAME>`` holds a URL the server is somebody else's: it is used as it is, and a
    test that stops, kills or restarts it is skipped.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.foreign = os.environ.get(f"EVENTBUS_TEST_{recipe.name.upper()}")
        self.process: subprocess.Popen[bytes] | None = None
        self.place: Place | None = None
        self._launcher = ThreadPoolExecutor(1)
        """The thread that all its processes are children of: the kernel ends them with their thread."""

    @property
    def url(self) -> str:
        """Return where clients connect."""
        return self.foreign or self.recipe.url.format(port=self._place().port)

    @property
    def port(self) -> int:
        """Return the port of a server of our own."""
        return self._place().port

    @property
    def pid(self) -> int:
        """Return the process that listens; raises ``RuntimeError`` while there is none."""
        if self.process is None:
            raise RuntimeError(f"{self.recipe.name} does not run")
        return self.process.pid

    def start(self) -> None:
        """Start it unless it runs, and wait until it answers."""
        if self.foreign or (self.process is not None and self.process.poll() is None):
            return
        if self.place is None:
            self._settle_down()
        self._launch()

    def stop(self) -> None:
        """End it in good order, and wait for the end."""
        process = self._ours()
        if process is None:
            return
        process.send_signal(self.recipe.ending)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """Kill it and all its children at once, as a crash would."""
        process = self._ours()
        if process is None:
            return
        family = [process.pid, *descendants(process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not any(alive(pid) for pid in family[1:]), 10, "its children live on")
        self.process = None

    def restart(self) -> None:
        """Stop it and start it again on the same port and the same data."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop it and remove its data."""
        if self.foreign or self.place is None:
            return
        self.stop()
        if self.recipe.farewell is not None:
            command = self.recipe.farewell(self.place)
            subprocess.run(command, check=False, capture_output=True, env=self._environment())
        shutil.rmtree(self.place.directory, ignore_errors=True)
        self.place = None
        self._launcher.shutdown()

    def _place(self) -> Place:
        if self.place is None:
            raise RuntimeError(f"{self.recipe.name} was not started")
        return self.place

    def _ours(self) -> "subprocess.Popen[bytes] | None":
        if self.foreign:
            pytest.skip(f"the {self.recipe.name} server is not ours to stop")
        return self.process

    def _settle_down(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix=f"eventbus-{self.recipe.name}-"))
        self.place = Place(directory, free_port(self.recipe.ports))
        commands = self.recipe.prepare(self.place)
        self._own(directory)
        for command in commands:
            self.run(command)

    def _own(self, directory: Path) -> None:
        if identity := self._identity():
            for path in (directory, *directory.rglob("*")):
                os.chown(path, identity["user"], identity["group"], follow_symlinks=False)

    def _identity(self) -> dict[str, Any]:
        if not self.recipe.unprivileged or os.geteuid() != 0:
            return {}
        nobody = pwd.getpwnam("nobody")
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def run(self, command: Sequence[str]) -> str:
        """Run a command as the server itself runs, and return what it prints; raises ``RuntimeError`` if it fails."""
        done = subprocess.run(
            command, check=False, capture_output=True, env=self._environment(), cwd=self._place().directory,
            **self._identity(),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr).decode(errors='replace')}")
        return done.stdout.decode()

    def _launch(self) -> None:
        place = self._place()
        with (place.directory / "server.log").open("ab") as log:
            self.process = self._launcher.submit(
                subprocess.Popen,
                [*leash(), *self.recipe.command(place)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment(), cwd=place.directory, start_new_session=True, **self._identity(),
            ).result()  # fmt: skip
        wait_until(self._answers, self.recipe.patience, self._log)

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise RuntimeError(f"{self.recipe.name} ended:\n{self._log()}")
        try:
            with socket.create_connection((HOST, self.port), timeout=2) as link:
                link.sendall(self.recipe.hello)
                return re.match(self.recipe.answer, link.recv(64), re.DOTALL) is not None
        except OSError:
            return False

    def _log(self) -> str:
        return (self._place().directory / "server.log").read_text(errors="replace")[-4_000:]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.recipe.environment(self._place())}


def leash() -> list[str]:
    """Return what makes the kernel end a child whose parent was killed and could not."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def free_port(count: int = 1) -> int:
    """Return the first of ``count`` free ports in a row.

    They lie below the ports that the system gives to clients, so that none is taken while its server is down.
    """
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(12_000, 32_000)
        with contextlib.ExitStack() as taken:
            try:
                for number in range(port, port + count):
                    link = taken.enter_context(socket.socket())
                    link.bind((HOST, number))
            except OSError:
                continue
            return port


def descendants(pid: int) -> list[int]:
    """Return the children of a process, and theirs."""
    found = []
    for path in Path(PROC, str(pid), "task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that only waits to be reaped does not."""
    if not PROC.is_dir():
        return signals_reach(pid)
    try:
        return Path(PROC, str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def signals_reach(pid: int) -> bool:
    """Tell whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(true: Callable[[], bool], seconds: float, why: "str | Callable[[], str]") -> None:
    """Ask until it is so; raises ``TimeoutError`` with the reason."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(why if isinstance(why, str) else why())
        time.sleep(0.02)  # between two questions to another process
