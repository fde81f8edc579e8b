"""Prove P1, P2, P3 and P9 by kill -9, again and again, on one database."""

import os
import random
import signal

import pytest

from tests.crash.child import SLOTS
from tests.crash.family import Family
from tests.crash.fate import POINTS, Fate
from tests.crash.site import Ledger, Site

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900 + int(os.environ.get("EVENTBUS_KILLS", "0")))]
PAIR = 2


def kill_a_pair(family: Family, lease: float, chance: random.Random, cycle: int) -> int:
    """Let two children work and die, at a point or at a moment; return how many were killed."""
    if chance.random() < 0.7:
        point = POINTS[cycle % len(POINTS)]
        fates = [Fate(point, chance.randint(1, 30)) for _ in range(PAIR)]
        moment = 3.0
    else:
        fates = [Fate()] * PAIR
        moment = chance.uniform(0.0, 0.25)
    first = family.start(lease=lease, seconds=1.0, fate=fates[0])
    second = family.started(lease=lease, seconds=1.0, fate=fates[1])
    return sum(family.end(child, moment, kill=True) == -signal.SIGKILL for child in (first, second))


@pytest.mark.parametrize("lease", [0.5, 3.0])
def test_nothing_is_lost_and_nothing_doubled_by_kills(site: Site, family: Family, lease: float, kills: int) -> None:
    """After any number of kills every committed event has its one effect, and repeats stay within the slots."""
    chance = random.Random(20_261_120)
    share = max(kills // (4 if site.store.startswith("sqlite:") else 8), 2)  # for each of two leases
    killed = cycle = 0
    while killed < share:
        killed += kill_a_pair(family, lease, chance, cycle)
        cycle += 1
        assert cycle <= share, "most children live on"
    family.finish(120.0 + share, lease=lease)
    ledger = site.audit()
    print(f"\nlease {lease:g} s, {killed} kills: {ledger}")
    assert ledger.made > 0
    assert Ledger(made=ledger.made, repeated=ledger.repeated, refused=ledger.refused) == ledger
    assert ledger.repeated <= killed * SLOTS
