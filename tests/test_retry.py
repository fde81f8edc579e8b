"""Retry: how long to wait, when to give up, and how an error is told."""

import pickle
import sys
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventbus.errors import Reject, RetryLater
from eventbus.retry import Again, Dead, Retry, decide, describe

SECONDS = st.floats(0, 1e6)
POLICIES = st.builds(
    lambda low, high, factor, jitter: Retry(5, min(low, high), max(low, high), factor, jitter),
    SECONDS,
    SECONDS,
    st.floats(1, 1e6) | st.sampled_from([1, 2, 1.0000000000000002, sys.float_info.max]),
    st.booleans(),
)
FAILURES = st.integers(1, 10**6)


def steady(policy: Retry) -> Retry:
    """Return the policy without jitter."""
    return Retry(policy.attempts, policy.initial, policy.maximum, policy.factor, jitter=False)


@given(POLICIES, FAILURES)
@example(Retry(5, 0.2, 30.0, 2.0), 10**6)
@example(Retry(5, 1, 30, 2), 10**6)
@example(Retry(5, 0.0, 30.0, 2.0), 10**6)
@example(Retry(5, 5e-324, 1e308, sys.float_info.max), 10**6)
def test_wait_without_jitter_grows_to_its_ceiling(policy: Retry, failure: int) -> None:
    """Without jitter no wait is shorter than the one before, none above the maximum, and the first is the initial."""
    policy, chance = steady(policy), Random(0)
    waits = [policy.wait(n, chance) for n in (1, failure, failure + 1, 10**6 + 1, 10**6 + 2)]
    assert sorted(waits) == waits
    assert policy.initial == waits[0]
    assert waits[-1] <= policy.maximum


@given(POLICIES, FAILURES, st.randoms(use_true_random=False))
def test_wait_with_jitter_stays_between_half_and_full(policy: Retry, failure: int, chance: Random) -> None:
    """Jitter takes at least half of the full wait, and never more than it."""
    full = steady(policy).wait(failure, chance)
    jittered = Retry(policy.attempts, policy.initial, policy.maximum, policy.factor, jitter=True)
    assert full / 2 <= jittered.wait(failure, chance) <= full


@given(POLICIES, FAILURES, st.integers())
def test_wait_is_decided_by_the_seed(policy: Retry, failure: int, seed: int) -> None:
    """The same seed waits the same time."""
    assert policy.wait(failure, Random(seed)) == policy.wait(failure, Random(seed))


def test_waits_double_by_default() -> None:
    """The default policy waits 0.2 s, then twice as long each time, up to 30 s."""
    chance = Random(0)
    expected = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert expected == [Retry(jitter=False).wait(n, chance) for n in range(1, 11)]


def test_jitter_uses_its_whole_range() -> None:
    """Jitter is spread between half and full, not gathered at one end."""
    chance = Random(0)
    waits = [Retry(initial=1.0).wait(1, chance) for _ in range(1_000)]
    assert (min(waits) < 0.51, max(waits) > 0.99, 0.74 < sum(waits) / 1_000 < 0.76) == (True, True, True)


@pytest.mark.parametrize(
    "given",
    [
        {"attempts": 0},
        {"attempts": -1},
        {"attempts": 1.0},
        {"attempts": True},
        {"attempts": "5"},
        {"initial": -0.1},
        {"initial": 31},
        {"initial": float("nan")},
        {"initial": None},
        {"maximum": 0.1},
        {"maximum": float("inf")},
        {"maximum": float("nan")},
        {"maximum": "30"},
        {"factor": 0.5},
        {"factor": float("nan")},
        {"factor": float("inf")},
        {"factor": True},
        {"on": ValueError},
        {"on": [ValueError]},
        {"on": ("ValueError",)},
        {"on": (int,)},
        {"on": (KeyboardInterrupt,)},
        {"give_up_on": KeyError},
        {"give_up_on": (KeyError(),)},
    ],
    ids=repr,
)
def test_policy_that_cannot_work_is_refused(given: dict[str, Any]) -> None:
    """A value that cannot work is refused where the policy is made, by its name."""
    with pytest.raises(ValueError, match=next(iter(given))):
        Retry(**given)


def test_policy_is_a_record() -> None:
    """Policies are equal by value, take attempts by position, and cannot be changed."""
    assert Retry(attempts=3) == Retry(3)
    with pytest.raises(AttributeError):
        Retry().attempts = 3  # type: ignore[misc]


def group(*errors: BaseException) -> BaseExceptionGroup[BaseException]:
    """Return an exception group."""
    return BaseExceptionGroup("several", errors)


POLICY = Retry(attempts=3, initial=1.0, jitter=False, on=(ValueError, OSError), give_up_on=(UnicodeError,))

DECISIONS: dict[str, tuple[int, BaseException, Again | Dead]] = {
    "first failure": (1, ValueError("x"), Again(1.0)),
    "second failure": (2, ValueError("x"), Again(2.0)),
    "a subclass": (1, FileNotFoundError("x"), Again(1.0)),
    "last failure": (3, ValueError("x"), Dead("failed 3 times; last: ValueError: x")),
    "beyond the last": (9, ValueError("x"), Dead("failed 9 times; last: ValueError: x")),
    "not worth it": (1, KeyError("x"), Dead("KeyError: 'x'")),
    "give_up_on beats on": (1, UnicodeError("x"), Dead("UnicodeError: x")),
    "Reject": (1, Reject("stolen"), Dead("Reject: stolen")),
    "RetryLater": (1, RetryLater(60), Again(60)),
    "RetryLater at once": (1, RetryLater(0), Again(0)),
    "RetryLater at the last attempt": (3, RetryLater(60), Dead("failed 3 times; last: RetryLater: again in 60 s")),
    "group of worthy": (1, group(ValueError("x"), OSError("y")), Again(1.0)),
    "group with one worthy": (1, group(Reject("x"), KeyError("y"), ValueError("z")), Again(1.0)),
    "group of Reject": (
        1,
        group(Reject("x"), group(UnicodeError("y"))),
        Dead("ExceptionGroup: several (2 sub-exceptions): Reject: x; UnicodeError: y"),
    ),
    "group with RetryLater": (1, group(Reject("x"), RetryLater(5), group(RetryLater(60)), ValueError()), Again(60)),
    "group with RetryLater, last attempt": (
        3,
        ExceptionGroup("several", [RetryLater(5)]),
        Dead("failed 3 times; last: ExceptionGroup: several (1 sub-exception): RetryLater: again in 5 s"),
    ),
}


@pytest.mark.parametrize(("attempt", "error", "expected"), DECISIONS.values(), ids=DECISIONS)
def test_decision(attempt: int, error: BaseException, expected: Again | Dead) -> None:
    """What becomes of a failed message follows from the policy, the attempt and the error alone."""
    assert expected == decide(POLICY, attempt, error, Random(0), 2_000)


def test_one_attempt_dies_at_once() -> None:
    """With one attempt the first failure is the last."""
    assert Dead("failed once; last: ValueError: x") == decide(Retry(1), 1, ValueError("x"), Random(0))


LEAVES = st.sampled_from([ValueError("v"), KeyError("k"), OSError("o"), UnicodeError("u"), Reject("r"), RetryLater(7)])
ERRORS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda found: ExceptionGroup("g", found)),
    max_leaves=6,
)


def leaves(error: BaseException) -> list[BaseException]:
    """Return the errors in a group."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in leaves(inner)]


@given(st.integers(1, 5), ERRORS)
def test_group_counts_as_its_errors(attempt: int, error: Exception) -> None:
    """However errors are grouped, the message lives while one of them is worth it and attempts are left."""
    found = leaves(error)
    later = any(isinstance(leaf, RetryLater) for leaf in found)
    worthy = any(isinstance(leaf, (ValueError, OSError)) and not isinstance(leaf, UnicodeError) for leaf in found)
    verdict = decide(POLICY, attempt, error, Random(0))
    assert ((later or worthy) and attempt < POLICY.attempts) == isinstance(verdict, Again)


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class EndlessError(Exception):
    def __str__(self) -> str:
        return "x" * 10**6


DESCRIPTIONS: dict[str, tuple[BaseException, str]] = {
    "plain": (ValueError("no such sku"), "ValueError: no such sku"),
    "without text": (ValueError(), "ValueError"),
    "blank text": (ValueError("  \n"), "ValueError"),
    "lines": (ValueError("a\r\nb\n\n\tc\u2028d\x85e"), "ValueError: a b c d e"),
    "ANSI": (ValueError("\x1b[31mred\x1b[0m \x07"), "ValueError: ?[31mred?[0m ?"),
    "NUL": (ValueError("a\0b"), "ValueError: a?b"),
    "text that turns round": (ValueError("a\u202eb\u2066c"), "ValueError: a?b?c"),
    "lone surrogate": (ValueError("a\ud800b"), "ValueError: a?b"),
    "other scripts": (ValueError("größe 尺寸 😀"), "ValueError: größe 尺寸 😀"),
    "no text to be had": (MuteError(), "MuteError: (its text cannot be read)"),
    "group": (
        ExceptionGroup("two", [ValueError("a\nb"), ExceptionGroup("in", [KeyError("c"), MuteError()])]),
        "ExceptionGroup: two (2 sub-exceptions): ValueError: a b; KeyError: 'c'; MuteError: (its text cannot be read)",
    ),
}


@pytest.mark.parametrize(("error", "expected"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_description(error: BaseException, expected: str) -> None:
    """An error is told in one harmless line: its type, its text, and the errors of a group."""
    assert expected == describe(error, 2_000)


@given(st.lists(st.text(st.characters(codec=None)), min_size=1, max_size=5), st.integers(1, 300))
def test_description_is_one_short_harmless_line(texts: list[str], limit: int) -> None:
    """Whatever an error says, its description fits, is one line, and can be stored as UTF-8."""
    for error in (ValueError(texts[0]), ExceptionGroup(texts[0] or "g", [ValueError(text) for text in texts])):
        told = describe(error, limit)
        assert (len(told) <= limit, len(told.splitlines()) == 1) == (True, True)
        assert told == told.encode().decode()
        assert "\x1b" not in told


def test_long_description_is_cut() -> None:
    """A text beyond the limit ends in an ellipsis, also as the reason of a death."""
    assert describe(EndlessError(), 17) == "EndlessError: xx…"
    assert Dead("failed once…") == decide(Retry(1), 1, EndlessError(), Random(0), 12)
    many = ExceptionGroup("many", [ValueError(n) for n in range(100_000)])
    assert len(describe(many, 2_000)) <= 2_000


def test_deep_group_is_described() -> None:
    """Groups in groups in groups cost no stack."""
    error: Exception = ValueError("x")
    for _ in range(5_000):
        error = ExceptionGroup("g", [error])
    assert describe(error, 100) == "ExceptionGroup: g (1 sub-exception): ValueError: x"
    assert Again(1.0) == decide(POLICY, 1, error, Random(0))


def test_records_survive_pickling() -> None:
    """Policies and verdicts can be sent to another process."""
    for record in (Retry(3), Again(1.0), Dead("x")):
        assert record == pickle.loads(pickle.dumps(record))
