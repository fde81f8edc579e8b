"""The promises hold among faults, in every order of events that the seeds come upon."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eventbus.claims import Claims
from eventbus.clock import Setback
from eventbus.store import Recipient
from eventbus.stores._memory_box import Box
from eventbus.stores.memory import MemoryStore
from tests.simulation.play import play
from tests.simulation.shop import quiet

ROOT = Path(__file__).parents[2]
CHUNK = 25
"""Seeds of one test."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Play as many seeds as ``--seeds`` says, or the one of ``--seed``."""
    if "chunk" in metafunc.fixturenames:
        seed, count = metafunc.config.getoption("--seed"), metafunc.config.getoption("--seeds")
        chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        chunks = chunks if seed is None else [range(seed, seed + 1)]
        metafunc.parametrize("chunk", chunks, ids=[f"{chunk[0]}-{chunk[-1]}" for chunk in chunks])


def test_promises_hold_among_faults(chunk: range) -> None:
    """No seed leads to a step that breaks an invariant, and every one ends with everything settled."""
    for seed in chunk:
        story = play(seed)
        if story.violation is not None:
            pytest.fail(
                f"{story}\n\nseed {seed}: {story.violation}\nagain: pytest tests/simulation --seed {seed}",
                pytrace=False,
            )


def test_same_seed_is_the_same_run() -> None:
    """Two runs of one seed have the same steps, byte for byte, and two seeds have not."""
    assert str(play(7)) == str(play(7))
    assert str(play(7)) != str(play(8))


def test_same_seed_is_the_same_run_in_another_process() -> None:
    """Neither the hashing of text nor anything else of a process shows in a run."""
    told = {
        subprocess.run(
            [sys.executable, "-m", "tests.simulation", "--seeds", "0-9", "--log"],
            cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT)}, capture_output=True,
            check=True,
        ).stdout.rpartition(b"sha256")[2]
        for salt in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1


def found(**changes: object) -> set[str]:
    """Return the invariants that thirty seeds break."""
    stories = [play(seed, traits=quiet(**changes)) for seed in range(30)]
    return {str(story.violation).partition(":")[0] for story in stories if story.violation is not None}


def test_oracle_sees_a_lost_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that lets anybody settle who once had a claim breaks the fourth invariant."""
    monkeypatch.setattr(MemoryStore, "held", lambda store, seq, claims: store._owned.get(seq))
    assert "invariant 4" in found(faults=("stall",), pause=1.0, length=5.0, requests=5)


def test_oracle_sees_broken_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that hands out more than the head of a lane breaks the fifth invariant."""

    def is_next(box: Box, due: int, seq: int) -> bool:
        row = box.rows.get(seq)
        return row is not None and row.due == due

    monkeypatch.setattr(Box, "_is_next", is_next)
    assert "invariant 5" in found(shape=1, keys=1, burst=5)


def test_oracle_sees_a_lost_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that forgets a recipient breaks the second invariant."""
    recipients = MemoryStore.recipients

    def forgetful(store: MemoryStore, new: object) -> tuple[Recipient, ...]:
        return recipients(store, new)[:-1]  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryStore, "recipients", forgetful)
    assert "invariant 2" in found()


def test_oracle_sees_a_lease_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in which what a dead process had stays its own never comes to its end."""
    claim = MemoryStore.claim

    async def for_ever(store: MemoryStore, *args: object, **options: object) -> object:
        return await claim(store, *args, **{**options, "lease": 86_400.0})  # type: ignore[arg-type]

    async def sweep(store: MemoryStore, **_: object) -> int:
        return 0

    monkeypatch.setattr(MemoryStore, "claim", for_ever)
    monkeypatch.setattr(MemoryStore, "sweep", sweep)
    assert "invariant 2" in found(faults=("crash",), pause=0.5, length=5.0, requests=5)


def test_oracle_sees_what_a_clock_set_back_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not notice that its clock was set back never comes to its end."""

    async def mend(setback: Setback, *_: object) -> int:
        return 0

    monkeypatch.setattr(Setback, "mend", mend)
    assert "invariant 2" in found(faults=("back",), pause=0.5, length=5.0, requests=5)


def test_oracle_sees_a_worker_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that only looks when it is woken breaks the seventh invariant."""

    async def rest(claims: Claims) -> None:
        while not claims._woken and not claims._stopped:
            await claims._news.wait()

    monkeypatch.setattr(Claims, "_rest", rest)
    assert "invariant 7" in found(faults=("crash",), pause=0.5, length=5.0, requests=5)
