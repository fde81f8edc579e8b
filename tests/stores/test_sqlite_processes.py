"""Prove that several processes may use one SQLite file at once, and that kill -9 takes nothing that was confirmed."""

import json
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import anyio

from eventbus.stores.sqlite import SQLiteStore
from tests.stores.child import INTERESTS, ORDERED, PUBLISHERS, TOTAL

ROOT = Path(__file__).parents[2]


def start(what: str, path: Path, number: int) -> subprocess.Popen[str]:
    """Start a child process."""
    command = [sys.executable, "-m", "tests.stores.child", what, str(path), str(number)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


async def make(path: Path) -> None:
    """Create the file and announce the handlers."""
    async with SQLiteStore(path) as store:
        await store.announce(INTERESTS)


def test_processes_race(tmp_path: Path) -> None:
    """No claim is given twice, no key is overtaken, nothing is lost, and "database is locked" reaches nobody."""
    path = tmp_path / "race.db"
    anyio.run(make, path)
    publishers = [start("publish", path, number) for number in range(PUBLISHERS)]
    workers = [start("work", path, number) for number in range(3)]
    for publisher in publishers:
        assert publisher.communicate(timeout=50)[0] == ""
        assert publisher.returncode == 0
    logs = [worker.communicate(timeout=50)[0] for worker in workers]
    assert [0, 0, 0] == [worker.returncode for worker in workers]
    log: list[list[Any]] = [line for text in logs for line in json.loads(text)]

    claims = Counter((seq, number) for what, seq, number, *_ in log if what == "claim")
    assert [] == [claim for claim, times in claims.items() if times > 1]
    written = Counter((seq, number) for what, seq, number, *rest in log if what != "claim" and not rest[0])
    assert [] == [claim for claim, times in written.items() if times > 1]
    done = {seq: at for what, seq, _, *rest in log if what == "done" and not rest[0] for at in rest[1:]}
    assert len(done) == TOTAL
    overtaken(log, done)
    database = sqlite3.connect(path)
    states = database.execute("SELECT state, count(*) FROM eventbus_entry GROUP BY 1").fetchall()
    assert [(1, TOTAL)] == states
    database.close()


def overtaken(log: list[list[Any]], done: dict[int, int]) -> None:
    """Fail if an entry was claimed before the one before it in its lane was done."""
    first: dict[int, int] = {}
    lanes: dict[str, set[int]] = {}
    for what, seq, _, *rest in log:
        if what == "claim" and rest[0] == ORDERED.name and rest[1] is not None:
            first[seq] = min(rest[3], first.get(seq, rest[3]))
            lanes.setdefault(rest[1], set()).add(seq)
    assert len(lanes) == 8
    for lane, seqs in lanes.items():
        order = sorted(seqs)
        for before, after in pairwise(order):
            assert first[after] > done[before], f"{after} overtook {before} in lane {lane}"


def test_kill_in_a_burst(tmp_path: Path) -> None:
    """After kill -9 in mid-burst, again and again, every confirmed message is there, whole, and the file is sound."""
    path = tmp_path / "kill.db"
    acked: set[str] = set()
    for number in range(3):
        child = start("burst", path, 8)
        acked |= killed_after(child, 20 + 40 * number)
        database = sqlite3.connect(path)
        assert [("ok",)] == database.execute("PRAGMA integrity_check").fetchall()
        ids = {id_ for (id_,) in database.execute("SELECT message_id FROM eventbus_entry")}
        rows = {id_ for (id_,) in database.execute("SELECT id FROM business")}
        counts = database.execute("SELECT message_id, count(*) FROM eventbus_entry GROUP BY 1 HAVING count(*) <> 2")
        assert [] == counts.fetchall()
        database.close()
        assert acked <= ids
        assert rows == {id_ for id_ in ids if int(id_.split("-")[1]) % 2}


def killed_after(child: subprocess.Popen[str], lines: int) -> set[str]:
    """Kill a child once it has printed so many lines; return all that it printed."""
    out: IO[str] | None = child.stdout
    assert out is not None
    acked = {out.readline().strip() for _ in range(lines)}
    child.send_signal(signal.SIGKILL)
    rest = out.read()
    child.wait(10)
    out.close()
    acked |= {line for line in rest.splitlines(keepends=False) if line.count("-") == 2}
    return acked if rest.endswith("\n") or not rest else acked - {rest.splitlines()[-1]}
