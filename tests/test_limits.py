"""Limits: every time and ceiling in one frozen record that takes nothing impossible."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from eventbus import Limits

TIMES = {"lease", "sweep", "drain", "connect", "retention", "unknown"}
NAMES = [field.name for field in fields(Limits)]


def test_defaults() -> None:
    """The defaults are those that the promises speak of."""
    limits = Limits()
    assert (30.0, 5.0, 20.0) == (limits.lease, limits.sweep, limits.drain)
    assert (7 * 24 * 3600.0, 24 * 3600.0) == (limits.retention, limits.unknown)
    assert (8, 10) == (limits.concurrency, limits.crashes)


@pytest.mark.parametrize("name", NAMES)
def test_one_value(name: str) -> None:
    """Each limit can be set alone, times also as whole numbers."""
    assert 7 == getattr(Limits(**{name: 7}), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1, True, "7", None, float("inf"), float("nan")], ids=repr)
def test_impossible_value(name: str, value: Any) -> None:
    """Whatever is not a finite number above zero is refused, by the name of its limit."""
    with pytest.raises(ValueError, match=rf"^Limits\({name}=\.\.\.\) "):
        Limits(**{name: value})


@pytest.mark.parametrize("name", sorted(set(NAMES) - TIMES))
def test_ceilings_are_whole(name: str) -> None:
    """A ceiling that counts things takes whole numbers only."""
    with pytest.raises(ValueError, match=r"takes a whole number, not 1\.5"):
        Limits(**{name: 1.5})


@pytest.mark.parametrize("name", sorted(TIMES))
def test_times_may_be_parts_of_seconds(name: str) -> None:
    """A time may be a part of a second."""
    assert 1.5 == getattr(Limits(**{name: 1.5}), name)


def test_frozen() -> None:
    """Limits cannot be changed, only made anew."""
    with pytest.raises(FrozenInstanceError):
        Limits().lease = 5.0  # type: ignore[misc]  # that is the point
    with pytest.raises(TypeError):
        Limits(5.0)  # type: ignore[misc]  # by name only
    with pytest.raises(TypeError):
        Limits(leese=5.0)  # type: ignore[call-arg]  # misspelt
