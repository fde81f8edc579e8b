"""The rehearsal: what a broker may do to handlers, played from a seed, and played again."""

from pathlib import Path

import anyio
import pytest

from eventbus.testing import harness
from tests.testing.planted import BUGS

SEEDS = 100


async def rehearse(bug: str, path: Path, seed: int, *, buggy: bool) -> BaseException | None:
    """Run the test of a planted bug under one seed; return what failed it, or None."""
    bus, test = BUGS[bug](path, buggy)
    try:
        async with harness(bus, mode="rehearsal", seed=seed) as t:
            await test(t)
    except (Exception, BaseExceptionGroup) as error:
        return error
    return None


@pytest.mark.parametrize("bug", BUGS)
async def test_bug_is_found(bug: str, tmp_path: Path) -> None:
    """Each planted bug fails its test within a hundred seeds, and the failure names the seed."""
    for seed in range(SEEDS):
        error = await rehearse(bug, tmp_path / f"{seed}.db", seed, buggy=True)
        if error is not None:
            assert f"seed={seed})" in "".join(error.__notes__)
            print(bug, seed, repr(error)[:300])
            return
    raise AssertionError(f"{SEEDS} seeds did not find it")


@pytest.mark.parametrize("bug", BUGS)
async def test_mended_passes(bug: str, tmp_path: Path) -> None:
    """The same application without the bug passes under every seed."""
    for seed in range(SEEDS):
        error = await rehearse(bug, tmp_path / f"{seed}.db", seed, buggy=False)
        if error is not None:
            raise error
