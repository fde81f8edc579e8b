"""Lanes: whoever is handed out, one of a key at a time, in the order in which they came."""

from collections import defaultdict, deque

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from eventbus._signal import Signal
from eventbus.lanes import Held, Lanes
from eventbus.transport import Delivery
from tests.doubles import Letter

KEYS = st.sampled_from(["a", "b", "c", None])


def taken(lanes: Lanes) -> list[str]:
    """Take all that can be taken."""
    ids = list[str]()
    while (delivery := lanes.take()) is not None:
        ids.append(delivery.wire.id)
    return ids


def test_without_order_everything_is_ready_at_once() -> None:
    """Where no order is kept a key means nothing."""
    lanes = Lanes(ordered=False)
    letters = [Letter(str(number), "a") for number in range(3)]
    assert [True] * 3 == [lanes.admit(letter) for letter in letters]
    assert ["0", "1", "2"] == taken(lanes)
    assert not lanes.leave(letters[0])
    lanes.send_away(letters[1])
    assert not lanes.give_up(letters[1])
    assert lanes.later(0) == 0


def test_one_of_a_key_at_a_time() -> None:
    """The next of a key becomes ready when the one before is settled; other keys and no key go on."""
    lanes = Lanes(ordered=True)
    a1, a2, a3, b1, n1 = Letter("a1", "a"), Letter("a2", "a"), Letter("a3", "a"), Letter("b1", "b"), Letter("n1")
    assert [True, False, False, True, True] == [lanes.admit(letter) for letter in (a1, a2, a3, b1, n1)]
    assert ["a1", "b1", "n1"] == taken(lanes)
    assert lanes.leave(a1)
    assert ["a2"] == taken(lanes)
    assert not lanes.leave(b1)
    assert not lanes.leave(n1)
    assert lanes.leave(a2)
    assert ["a3"] == taken(lanes)
    assert not lanes.leave(a3)
    assert lanes.admit(Letter("a4", "a"))


def test_key_waits_for_the_one_that_is_away() -> None:
    """While a message is back in its transport its key waits; when it comes again it is first."""
    lanes = Lanes(ordered=True)
    first, second, third = Letter("1", "a"), Letter("2", "a"), Letter("3", "a")
    lanes.admit(first)
    lanes.admit(second)
    assert ["1"] == taken(lanes)
    lanes.send_away(first)
    assert not lanes.admit(third)
    assert [] == taken(lanes)
    assert lanes.later(0) == 2
    assert lanes.admit(Letter("1", "a", attempt=2))
    assert ["1"] == taken(lanes)
    assert lanes.leave(first)
    assert ["2"] == taken(lanes)


def test_giving_up_on_one_that_does_not_come_back() -> None:
    """When a message cannot be sent back after all, the next of its key comes, unless it is back by now."""
    lanes = Lanes(ordered=True)
    first, second = Letter("1", "a"), Letter("2", "a")
    lanes.admit(first)
    lanes.admit(second)
    taken(lanes)
    lanes.send_away(first)
    assert lanes.give_up(first)
    assert ["2"] == taken(lanes)
    lanes.send_away(second)
    again = Letter("2", "a", attempt=2)
    lanes.admit(again)
    assert ["2"] == taken(lanes)
    assert not lanes.give_up(second)
    assert not lanes.admit(Letter("3", "a"))
    assert [] == taken(lanes)


def test_parked_until_due() -> None:
    """What is parked becomes ready at its time and in the order of the times, its key waiting meanwhile."""
    lanes = Lanes(ordered=True)
    first, second, other = Letter("1", "a"), Letter("2", "a"), Letter("3", "b")
    for letter in (first, second, other):
        lanes.admit(letter)
    assert ["1", "3"] == taken(lanes)
    lanes.park(first, 20.0)
    lanes.park(other, 10.0)
    assert lanes.next_due() == 10.0
    assert lanes.later(5.0) == 3
    assert lanes.ripen(9.9) == 0
    assert lanes.ripen(10.0) == 1
    assert ["3"] == taken(lanes)
    assert lanes.later(10.0) == 2
    assert lanes.ripen(30.0) == 1
    assert ["1"] == taken(lanes)
    assert lanes.next_due() is None
    assert lanes.leave(first)
    assert ["2"] == taken(lanes)


def test_parked_at_the_same_time_in_the_order_of_parking() -> None:
    """Equal times keep the order of parking."""
    lanes = Lanes(ordered=False)
    letters = [Letter(str(number)) for number in range(5)]
    for letter in letters:
        lanes.park(letter, 1.0)
    assert letters == list(lanes)
    assert lanes.ripen(1.0) == 5
    assert ["0", "1", "2", "3", "4"] == taken(lanes)


def test_clear_gives_everything_up() -> None:
    """All that was not started comes back, what is behind a key after what is before it, and nothing stays."""
    lanes = Lanes(ordered=True)
    letters = [Letter("1", "a"), Letter("2", "b"), Letter("3", "a"), Letter("4", "c"), Letter("5", "a")]
    for letter in letters:
        lanes.admit(letter)
    assert lanes.take() is letters[0]
    second = lanes.take()
    assert second is not None
    lanes.park(second, 5.0)
    cleared = lanes.clear()
    assert ["4", "2", "3", "5"] == [letter.wire.id for letter in cleared]
    assert [] == list(lanes)
    assert (None, None, 0) == (lanes.take(), lanes.next_due(), lanes.later(0))
    assert lanes.admit(Letter("6", "a"))


async def test_held_passes_everything_on() -> None:
    """What waited here is settled there, and holding it again does not wrap it again."""
    letter = Letter("1", "a")
    held = Held(Held(Held(letter, 2), 3), 4)
    assert (letter.wire, 4) == (held.wire, held.attempt)
    await held.ack()
    await held.retry(3.0)
    await held.reject("why")
    await held.extend()
    assert ["ack", ("retry", 3.0), ("reject", "why"), "extend"] == letter.verbs
    for number in range(5_000):
        held = Held(held, number)
    await held.ack()


async def test_signal_wakes_all_who_wait_now() -> None:
    """Everybody who waits is woken once; who comes later waits for the next."""
    signal, woken = Signal(), list[int]()

    async def waits(number: int) -> None:
        await signal.wait()
        woken.append(number)

    signal.fire()
    async with anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(waits, number)
        await anyio.wait_all_tasks_blocked()
        assert [] == woken
        signal.fire()
        await anyio.wait_all_tasks_blocked()
        assert [0, 1, 2] == sorted(woken)
        with anyio.move_on_after(0.01) as scope:
            await signal.wait()
        assert scope.cancelled_caught


class Model(RuleBasedStateMachine):
    """Compare lanes with a list per key of what came, whose first is the only one that may be out."""

    out = Bundle("out")

    def __init__(self) -> None:
        super().__init__()
        self.lanes = Lanes(ordered=True)
        self.now = 0.0
        self.number = 0
        self.lines: defaultdict[str, deque[str]] = defaultdict(deque)
        self.ready: list[str] = []
        self.started: dict[str, Delivery] = {}
        self.parked: dict[str, float] = {}
        self.away: dict[str, Letter] = {}

    @rule(key=KEYS)
    def admit(self, key: str | None) -> None:
        """Let a new message come."""
        self.number += 1
        letter = Letter(str(self.number), key)
        first = key is None or not self.lines[key]
        if key is not None:
            self.lines[key].append(letter.wire.id)
        if first:
            self.ready.append(letter.wire.id)
        assert self.lanes.admit(letter) == first

    @rule()
    def take(self) -> None:
        """Start what is ready."""
        delivery = self.lanes.take()
        if not self.ready:
            assert delivery is None
            return
        assert delivery is not None
        assert delivery.wire.id == self.ready.pop(0)
        self.started[delivery.wire.id] = delivery

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Settle one for good."""
        delivery = self.started.pop(data.draw(st.sampled_from(sorted(self.started))))
        assert self.lanes.leave(delivery) == self.advanced(delivery)

    @precondition(lambda self: self.started)
    @rule(data=st.data(), wait=st.integers(1, 5))
    def park(self, data: st.DataObject, wait: int) -> None:
        """Let one wait here."""
        delivery = self.started.pop(data.draw(st.sampled_from(sorted(self.started))))
        self.parked[delivery.wire.id] = self.now + wait
        self.lanes.park(Held(delivery, delivery.attempt + 1), self.now + wait)

    @rule(by=st.integers(0, 4))
    def pass_time(self, by: int) -> None:
        """Let parked ones come due."""
        self.now += by
        due = [id for id, moment in self.parked.items() if moment <= self.now]
        due.sort(key=lambda id: self.parked[id])
        assert self.lanes.ripen(self.now) == len(due)
        for id in due:
            del self.parked[id]
        self.ready.extend(due)

    @precondition(lambda self: self.started)
    @rule(data=st.data())
    def send_away(self, data: st.DataObject) -> None:
        """Let the transport have one again."""
        delivery = self.started.pop(data.draw(st.sampled_from(sorted(self.started))))
        self.lanes.send_away(delivery)
        self.away[delivery.wire.id] = Letter(delivery.wire.id, delivery.wire.key)

    @precondition(lambda self: self.away)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """Let one come again."""
        letter = self.away.pop(data.draw(st.sampled_from(sorted(self.away))))
        assert self.lanes.admit(letter)
        self.ready.append(letter.wire.id)
        assert not self.lanes.give_up(letter)

    @precondition(lambda self: any(letter.wire.key for letter in self.away.values()))
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """Learn that one could not be sent away."""
        keyed = sorted(id for id, letter in self.away.items() if letter.wire.key)
        letter = self.away.pop(data.draw(st.sampled_from(keyed)))
        assert self.lanes.give_up(letter) == self.advanced(letter)

    def advanced(self, delivery: Delivery) -> bool:
        """Take the first off its line; tell whether another became ready."""
        key = delivery.wire.key
        if key is None:
            return False
        assert self.lines[key].popleft() == delivery.wire.id
        if self.lines[key]:
            self.ready.append(self.lines[key][0])
        return bool(self.lines[key])

    @invariant()
    def counts(self) -> None:
        """Everything unstarted is held exactly once, and what waits until later is counted."""
        waiting = [id for line in self.lines.values() for id in list(line)[1:]]
        assert sorted([*self.ready, *self.parked, *waiting]) == sorted(one.wire.id for one in self.lanes)
        later = len(self.parked)
        later += sum(
            len(line) - 1 for line in self.lines.values() if line and (line[0] in self.parked or line[0] in self.away)
        )
        assert later == self.lanes.later(self.now)
        assert self.lanes.next_due() == min(self.parked.values(), default=None)


Model.TestCase.settings = settings(stateful_step_count=40, deadline=None)
TestModel = pytest.mark.timeout(120)(Model.TestCase)
