"""Prove P4 with several workers: per key nothing overtakes, whatever fails, and a dead one lets the next come."""

import os
import random
from multiprocessing.process import BaseProcess

import pytest

from tests.crash.family import Family
from tests.crash.lanes import Lanes, play
from tests.crash.site import Site

KEYS = int(os.environ.get("EVENTBUS_KEYS", "60"))
EACH = int(os.environ.get("EVENTBUS_STEPS", "10"))
WORKERS = int(os.environ.get("EVENTBUS_WORKERS", "3"))
PATIENCE = 600 + KEYS * EACH // 20
"""Seconds for all of it."""

pytestmark = [pytest.mark.crash, pytest.mark.long, pytest.mark.timeout(PATIENCE + 300)]


def test_no_key_is_inverted(site: Site, family: Family) -> None:
    """Workers that fail often, one of them killed, handle every key in its order; what was to die is dead."""
    poisoned = frozenset(random.Random(7).sample(range(KEYS), KEYS // 20))
    work = Lanes(store=site.store, keys=KEYS, each=EACH, poisoned=poisoned)
    publish = Lanes(store=site.store, keys=KEYS, each=EACH, poisoned=poisoned, publishes=True)
    for part in (work, publish):  # the first only announces the handler
        assert family.end(family.run(play, part), PATIENCE) == 0
    children = [family.run(play, work) for _ in range(WORKERS)]
    children[0].join(1.0)
    children[0].kill()
    assert {ended(child) for child in children[1:]} == {0}
    seen: dict[str, list[int]] = {}
    for lane, number in site.rows("SELECT lane, number FROM effects ORDER BY id"):
        seen.setdefault(lane, []).append(number)
    print(f"\n{KEYS} keys of {EACH} steps, {len(poisoned)} with a dead one: {sum(map(len, seen.values()))} effects")
    without = [step for step in range(EACH) if step != EACH // 2]
    assert seen == {f"key-{key}": without if key in poisoned else list(range(EACH)) for key in range(KEYS)}
    states = site.rows("SELECT state, COUNT(*) FROM eventbus_entry GROUP BY state ORDER BY state")
    assert states == [(1, KEYS * EACH - len(poisoned)), (2, len(poisoned))]


def ended(child: BaseProcess) -> int | None:
    """Wait for a child whose handlers fail on purpose, so that it has much to say."""
    child.join(PATIENCE)
    return child.exitcode
