"""Prove that workers share the work: none takes what another has, and a stopped one loses what it had."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.crash.child import SLOTS
from tests.crash.family import Family
from tests.crash.fate import Fate
from tests.crash.site import Ledger, Site
from tests.servers.server import wait_until

pytestmark = [pytest.mark.crash, pytest.mark.timeout(180)]


def test_workers_share_the_work(site: Site, family: Family) -> None:
    """Two processes that start at once on an empty database publish and handle: each message once, keys in order."""
    children = [family.start(lease=30.0, seconds=2.0) for _ in range(2)]
    assert [family.end(child) for child in children] == [0, 0]
    family.finish(lease=30.0)
    ledger = site.audit()
    print(f"\n{ledger}")
    assert ledger.made > 50
    assert Ledger(made=ledger.made, refused=ledger.refused) == ledger
    assert len({line[2] for line in site.lines("mail.txt")}) >= 2


@pytest.mark.long
@pytest.mark.parametrize("point", ["after_claim", "in_handler", "after_effect", "before_settle", "in_mail"])
def test_a_stopped_worker_is_fenced(site: Site, family: Family, point: str) -> None:
    """A worker that stands still beyond its lease finds, when it goes on, that others did its work; once."""
    lease = 0.5
    family.finish(lease=lease)  # announces the handlers
    assert family.end(family.start(lease=lease, seconds=0.3, consume=False)) == 0
    stopped = family.start(lease=lease, fate=Fate(point, 3, signal.SIGSTOP))
    wait_until(lambda: not stopped.is_alive() or stands(stopped.pid), 30, "it was not stopped")
    assert stopped.is_alive(), f"it ended before it came to its point: {family.complaints(stopped)}"
    other = family.start(lease=lease)
    if not site.exclusive:
        wait_until(lambda: family.runs(other), 30, "the other did not come up")
    time.sleep(2 * lease)  # the lease has to lapse while the process stands: the fact under test
    os.kill(stopped.pid or 0, signal.SIGCONT)
    assert [family.end(child) for child in (stopped, other)] == [0, 0]
    family.finish(lease=lease)
    ledger = site.audit()
    print(f"\nstopped {point}: {ledger}")
    assert Ledger(made=ledger.made, repeated=ledger.repeated, refused=ledger.refused) == ledger
    stalled = 2 if site.exclusive else 1  # a process that stands with the only writer makes the other stand too
    assert ledger.repeated <= stalled * SLOTS


def stands(pid: int | None) -> bool:
    """Tell whether a process is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
