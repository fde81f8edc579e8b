"""Prove P1, P2, P3 and P9 by kill -9, again and again, on one file."""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.child import POINTS, SLOTS

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.crash, pytest.mark.timeout(1_800)]


@dataclass(frozen=True)
class Ledger:
    """Count what is left after all kills."""

    made: int
    lost: int
    phantom: int
    torn: int
    doubled: int
    unmailed: int
    repeated: int
    dead: int
    integrity: str


def start(directory: Path, seconds: float, lease: float, *fate: str) -> "subprocess.Popen[bytes]":
    """Start a child."""
    command = [sys.executable, "-m", "tests.crash.child", str(directory), str(seconds), str(lease), *fate]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def run_and_kill(directory: Path, lease: float, chance: random.Random, cycle: int) -> bool:
    """Let a child work and die, at a point or at a moment; return whether it was killed."""
    point = POINTS[cycle % len(POINTS)]
    if chance.random() < 0.7:
        child = start(directory, 2.0, lease, point, str(chance.randint(1, 30)))
        moment = 5.0
    else:
        child = start(directory, 30.0, lease)
        before = (directory / "ready.txt").stat().st_size if (directory / "ready.txt").exists() else 0
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (
            not (directory / "ready.txt").exists() or (directory / "ready.txt").stat().st_size == before
        ):
            if child.poll() is not None:
                break
        moment = chance.uniform(0.0, 0.25)
    try:
        child.wait(moment)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    errors = child.stderr.read().decode() if child.stderr else ""
    if child.stderr:
        child.stderr.close()
    assert child.returncode in (-signal.SIGKILL, 0), errors
    assert "Traceback" not in errors, errors
    return child.returncode == -signal.SIGKILL


def audit(directory: Path) -> Ledger:
    """Read the files and the database, and count."""
    database = sqlite3.connect(directory / "crash.db")
    made = {number for (number,) in database.execute("SELECT number FROM made")}
    effects = Counter(number for (number,) in database.execute("SELECT number FROM effects"))
    done = Counter(database.execute("SELECT recipient, state FROM eventbus_entry").fetchall())
    integrity = database.execute("PRAGMA integrity_check").fetchone()[0]
    database.close()
    acked = {int(line) for line in (directory / "acked.txt").read_text().split()}
    mails = Counter(int(line.split()[0]) for line in (directory / "mail.txt").read_text().splitlines())
    entries = sum(done.values())
    return Ledger(
        made=len(made),
        lost=len(acked - made) + len(made - set(effects)),
        phantom=len(set(effects) - made) + len(set(mails) - made),
        torn=abs(entries - 2 * len(made)),
        doubled=sum(count - 1 for count in effects.values()),
        unmailed=len(made - set(mails)),
        repeated=sum(count - 1 for count in mails.values()),
        dead=sum(count for (_, state), count in done.items() if state == 2),
        integrity=integrity,
    )


@pytest.mark.parametrize("lease", [0.5, 3.0])
def test_nothing_is_lost_and_nothing_doubled_by_kills(tmp_path: Path, lease: float, kills: int) -> None:
    """After any number of kills every committed event has its one effect, and repeats stay within the slots."""
    chance = random.Random(20_261_120)
    killed = sum(run_and_kill(tmp_path, lease, chance, cycle) for cycle in range(max(kills // 2, 1)))
    last = start(tmp_path, 0, lease)
    assert last.wait(120 + 2 * kills) == 0, last.stderr.read().decode() if last.stderr else ""
    if last.stderr:
        last.stderr.close()
    ledger = audit(tmp_path)
    print(f"\nlease {lease:g} s, {killed} kills: {ledger}")
    assert ledger.made > 0
    expected = Ledger(
        made=ledger.made, lost=0, phantom=0, torn=0, doubled=0, unmailed=0, repeated=ledger.repeated, dead=0,
        integrity="ok",
    )  # fmt: skip
    assert expected == ledger
    assert ledger.repeated <= killed * SLOTS
