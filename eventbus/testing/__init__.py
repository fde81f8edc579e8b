"""What users import in their tests."""

from eventbus.testing.clock import VirtualClock
from eventbus.testing.harness import Harness, NotSettledError, UnobservedError, harness

__all__ = ("Harness", "NotSettledError", "UnobservedError", "VirtualClock", "harness")
