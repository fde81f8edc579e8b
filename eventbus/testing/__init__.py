"""What users import in their tests."""

from eventbus.testing.blocking import BlockingHarness, blocking
from eventbus.testing.clock import VirtualClock
from eventbus.testing.harness import Harness, harness
from eventbus.testing.record import Handling, Seen, UnobservedError
from eventbus.testing.rehearsal import Rehearsal, RehearsalError
from eventbus.testing.settling import NotSettledError
from eventbus.testing.standins import Stub

__all__ = (
    "BlockingHarness",
    "Handling",
    "Harness",
    "NotSettledError",
    "Rehearsal",
    "RehearsalError",
    "Seen",
    "Stub",
    "UnobservedError",
    "VirtualClock",
    "blocking",
    "harness",
)
