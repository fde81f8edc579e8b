"""The rehearsal: what a broker may do to handlers, played from a seed, and played again."""

import logging
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventbus import Command, Event, EventBus, Module, Reject, Retry, StoreError, Transaction
from eventbus.stores.memory import MemorySession, MemoryStore
from eventbus.stores.sqlite import SQLiteSession, SQLiteStore
from eventbus.testing import Harness, RehearsalError, harness
from tests.doubles import Flaky, raised
from tests.testing.planted import BUGS

SEEDS = 100

pytestmark = pytest.mark.timeout(180)


class Placed(Event, name="e.placed", key="sku"):
    """State that something was placed."""

    number: int = 0
    sku: str = "a"


class Shipped(Event, name="e.shipped"):
    """State that something was shipped."""

    number: int = 0


class Place(Command[int], name="e.place"):
    """Ask to place something."""

    number: int = 0


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Leave out what the bus logs about every rehearsed failure."""
    caplog.set_level(logging.CRITICAL)


# the planted bugs


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
    """Each planted bug fails its test within a hundred seeds, and the failure names the seed and what was played."""
    for seed in range(SEEDS):
        error = await rehearse(bug, tmp_path / f"{seed}.db", seed, buggy=True)
        if error is not None:
            [note] = [note for note in error.__notes__ if note.startswith("rehearsed with")]
            assert f'harness(bus, mode="rehearsal", seed={seed})' in note
            assert "played:\n" in note
            return
    raise AssertionError(f"{SEEDS} seeds did not find it")


@pytest.mark.parametrize("bug", BUGS)
async def test_mended_passes(bug: str, tmp_path: Path) -> None:
    """The same application without the bug passes under every seed."""
    for seed in range(SEEDS):
        error = await rehearse(bug, tmp_path / f"{seed}.db", seed, buggy=False)
        if error is not None:
            raise error


QUEUED = {"not_idempotent", "lost_update", "published_outside", "unserialisable", "mutable_shared", "blocking"}
"""The bugs that a test without rehearsal does not see."""


@pytest.mark.parametrize("bug", sorted(QUEUED - {"lost_update"}))
async def test_without_rehearsal_the_bug_is_hidden(bug: str, tmp_path: Path) -> None:
    """The same test passes where nothing goes wrong: it takes the rehearsal to fail."""
    bus, test = BUGS[bug](tmp_path / "x.db", True)
    async with harness(bus) as t:
        await test(t)


# the seed


async def play(seed: int, backend_log: list[str]) -> str:
    """Run a lively application under a seed, note what its handlers do, and return the schedule."""
    module = Module("m")

    def handler(name: str) -> Callable[[Placed, EventBus], object]:
        async def handle(event: Placed, bus: EventBus) -> None:
            backend_log.append(f"{name} begins {event.number}")
            for _ in range(event.number % 3):
                await checkpoint()
            if event.number < 6:
                await bus.publish(Placed(number=event.number + 3, sku=event.sku))
            await checkpoint()
            backend_log.append(f"{name} ends {event.number}")
            if event.number == 5 and len(backend_log) < 60:
                raise ValueError

        return handle

    for name in ("one", "two"):
        module.on(Placed, name=name, ordered=name == "two", retry=Retry(attempts=3, initial=20))(handler(name))  # type: ignore[arg-type]
    async with harness(EventBus(module, routes={"e.*": "memory"}), mode="rehearsal", seed=seed) as t:
        assert t.rehearsal is not None
        for number in range(3):
            await t.publish(Placed(number=number, sku="ab"[number % 2]))
        await t.settled()
        await t.advance(1000)
        assert t.failed("m.one") is not t.failed("m.two")
        backend_log.append(" ".join(f"{one.message_id}@{one.began!r}" for one in t.handlings))
        return t.rehearsal.schedule


def test_same_seed_same_run() -> None:
    """The same seed plays the same, to the byte: schedule, ids, times, and what handlers did, on each event loop."""
    for backend in ("asyncio", "trio"):
        different = set[str]()
        for seed in range(8):
            runs = list[tuple[str, list[str]]]()
            for _ in range(2):
                log = list[str]()
                schedule = anyio.run(play, seed, log, backend=backend)
                runs.append((schedule, log))
            assert runs[0][0].encode() == runs[1][0].encode()
            assert runs[0][1] == runs[1][1]
            different.add(runs[0][0])
        assert len(different) == 8


def test_same_seed_same_run_with_a_database(tmp_path: Path) -> None:
    """It plays the same with a store in a file, whose answers come from another thread."""
    runs = list[str]()

    async def run(path: Path) -> None:
        bus, test = BUGS["published_outside"](path, False)
        async with harness(bus, mode="rehearsal", seed=11) as t:
            assert t.rehearsal is not None
            await test(t)
            runs.append(t.rehearsal.schedule)

    for number in range(6):
        anyio.run(run, tmp_path / f"{number}.db", backend=("asyncio", "trio")[number % 2])
    assert len(set(runs)) == 1
    assert "starts" in runs[0]


async def test_without_a_seed_one_is_drawn() -> None:
    """A rehearsal without a seed draws one and tells it when the test fails."""
    with raised(KeyError) as caught:
        async with harness(EventBus(), mode="rehearsal") as t:
            assert t.rehearsal is not None
            drawn = t.rehearsal.seed
            raise KeyError
    assert f"seed={drawn})" in caught[0].__notes__[-1]


# what is played


async def seeds(
    run: Callable[[Harness], object], make: Callable[[], EventBus], *, store: Callable[[], MemoryStore] | None = None
) -> list[str]:
    """Run a test under some seeds; return the schedules."""
    schedules = list[str]()
    for seed in range(40):
        async with harness(make(), mode="rehearsal", seed=seed, store=store() if store else None) as t:
            await run(t)  # type: ignore[misc]
            assert t.rehearsal is not None
            schedules.append(t.rehearsal.schedule)
    return schedules


async def test_reorders_across_keys_never_inside() -> None:
    """Messages of different keys overtake one another; those of a key of an ordered handler never do."""
    module, started = Module("m"), list[Placed]()
    overtaken = list[bool]()

    @module.on(Placed, ordered=True)
    async def ordered(event: Placed) -> None:
        if event not in started:
            started.append(event)
        await checkpoint()

    async def run(t: Harness) -> None:
        started.clear()
        for number in range(6):
            await t.publish(Placed(number=number, sku="ab"[number % 2]))
        await t.settled()
        numbers = [event.number for event in started]
        overtaken.append(numbers != sorted(numbers))
        for sku in "ab":
            ours = [event.number for event in started if event.sku == sku]
            assert ours == sorted(ours)
            assert len(ours) == 3

    await seeds(run, lambda: EventBus(module, routes={"e.*": "memory"}))
    assert any(overtaken)


async def test_everything_is_played() -> None:
    """Some seeds have late messages, lost acknowledgements, twins, and publishes that do not get through."""
    module, counts = Module("m"), list[int]()

    @module.on(Placed)
    async def place(event: Placed, bus: EventBus) -> None:
        counts.append(event.number)
        await bus.publish(Shipped(number=event.number))

    @module.on(Shipped)
    async def ship(event: Shipped) -> None: ...

    async def run(t: Harness) -> None:
        for number in range(3):
            await t.publish(Placed(number=number))
        await t.settled()
        assert sorted(event.number for event in t.handled("m.place")) == [0, 1, 2]

    played = "\n".join(await seeds(run, lambda: EventBus(module, routes={"e.*": "memory"})))
    for what in ("starts, late", "its acknowledgement was lost", "comes twice at once", "did not get through"):
        assert what in played
    assert len(counts) > 3 * 40


async def test_transaction_is_played_and_recognised(tmp_path: Path) -> None:
    """A handler with a transaction sees commits fail, and is not run again once it is done."""
    module, effects = Module("m"), list[int]()

    @module.on(Placed)
    async def place(event: Placed, tx: Transaction[MemorySession]) -> None:
        effects.append(event.number)

    async def run(t: Harness) -> None:
        effects.clear()
        await t.publish(Placed(number=1))
        await t.settled()
        assert t.rehearsal is not None
        lost = t.rehearsal.schedule.count("its transaction was not committed")
        assert effects == [1] * (1 + lost)

    make: Callable[[], EventBus] = lambda: EventBus(  # noqa: E731
        module, name="shop", routes={"e.*": "store"}, store=MemoryStore()
    )
    played = "\n".join(await seeds(run, make))
    assert "its transaction was not committed (Lapse)" in played
    assert "it is done already" in played


async def test_test_itself_is_spared() -> None:
    """What the test calls, commits and publishes itself never fails, and failures of handlers are counted as ever."""
    module = Module("m")

    @module.handles(Place)
    async def place(cmd: Place, tx: Transaction[MemorySession], bus: EventBus) -> int:
        await bus.publish(Placed(number=cmd.number))
        return cmd.number

    @module.on(Placed, retry=Retry(attempts=2, initial=5))
    async def dies(event: Placed) -> None:
        raise Reject("no")

    async def run(t: Harness) -> None:
        for number in range(5):
            assert await t.send(Place(number=number)) == number
            async with t.bus.transaction():
                await t.publish(Shipped(number=number))
        await t.settled()
        assert len(t.dead) == 5

    make: Callable[[], EventBus] = lambda: EventBus(  # noqa: E731
        module, Module("n", messages=[Shipped]), name="shop", routes={"e.*": "store"}, store=MemoryStore()
    )
    await seeds(run, make)


async def test_broker_of_the_application_is_rehearsed() -> None:
    """What the application sends to its broker goes over the same stage, and the broker is not touched."""
    module, broker = Module("m"), Flaky()

    @module.on(Placed)
    async def place(event: Placed) -> None:
        await checkpoint()

    async def run(t: Harness) -> None:
        await t.publish(Placed(number=1))
        await t.settled()
        assert t.handled("m.place") == [Placed(number=1)]

    make: Callable[[], EventBus] = lambda: EventBus(  # noqa: E731
        module, name="shop", transports={"events": broker}, routes={"e.*": "events"}
    )
    assert "again" in "\n".join(await seeds(run, make))
    assert broker.calls["open"] == 0


async def test_own_error_of_a_handler_is_not_hidden() -> None:
    """A handler that cannot be run twice fails at its second run, as it would behind a broker."""
    module, seen = Module("m"), set[int]()

    @module.on(Placed, retry=Retry(attempts=1))
    async def once(event: Placed) -> None:
        if event.number in seen:
            raise KeyError(event.number)
        seen.add(event.number)

    found = 0
    for seed in range(20):
        seen.clear()
        async with harness(EventBus(module, routes={"e.*": "memory"}), mode="rehearsal", seed=seed) as t:
            await t.publish(Placed(number=1))
            await t.settled()
            found += len(t.dead)
    assert 0 < found < 20


async def test_swallowed_failure_is_the_handlers_own() -> None:
    """A handler that swallows the failure of its publish is not run again: its event is missing, as it would be."""
    module = Module("m")

    @module.on(Placed, ordered=True)
    async def place(event: Placed, bus: EventBus) -> None:
        try:
            await bus.publish(Shipped(number=event.number))
        except Exception:
            await checkpoint()

    @module.on(Shipped)
    async def ship(event: Shipped) -> None: ...

    missing = 0
    for seed in range(30):
        async with harness(EventBus(module, routes={"e.*": "memory"}), mode="rehearsal", seed=seed) as t:
            await t.publish(Placed(number=1))
            await t.settled()
            missing += not t.published(Shipped)
    assert 0 < missing < 30


async def test_blocking_is_measured_in_steps(tmp_path: Path) -> None:
    """Real time that passes while a handler awaits is no blocking."""
    module = Module("m")

    @module.on(Placed)
    async def waits(event: Placed) -> None:
        await anyio.sleep(0.15)

    async with harness(EventBus(module, routes={"e.*": "memory"}), mode="rehearsal", seed=2) as t:
        await t.publish(Placed())


async def test_timeouts_and_cuts_get_through() -> None:
    """A handler that hangs on the stage is ended by its timeout, and by the end of a failing test."""
    module, ended = Module("m"), list[str]()

    @module.on(Placed, timeout=5, retry=Retry(attempts=1))
    async def hangs(event: Placed) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("hangs")

    bus = EventBus(module, routes={"e.*": "memory"})
    async with harness(bus, mode="rehearsal", seed=1) as t:
        await t.publish(Placed())
        await t.advance(10)
        assert "HandlerTimeoutError" in t.dead[0].error
    with anyio.fail_after(20), raised(KeyError):
        async with harness(bus, mode="rehearsal", seed=1) as t:
            for number in range(3):
                await t.publish(Placed(number=number))
            with anyio.move_on_after(0.1):
                await t.settled()
            raise KeyError
    assert len(ended) >= 2


async def test_error_classes() -> None:
    """What a rehearsal raises can be caught as a failed assertion, and its own failures as what they stand for."""
    assert issubclass(RehearsalError, AssertionError)
    module, caught = Module("m"), list[StoreError]()

    @module.on(Placed)
    async def place(event: Placed, bus: EventBus) -> None:
        try:
            async with bus.transaction():
                await checkpoint()
        except StoreError as error:
            caught.append(error)
            raise

    for seed in range(20):
        bus = EventBus(module, name="shop", routes={"e.*": "store"}, store=MemoryStore())
        async with harness(bus, mode="rehearsal", seed=seed) as t:
            await t.publish(Placed())
    assert caught


async def test_rows_and_entries_agree(tmp_path: Path) -> None:
    """With a database, what a handler wrote is there once, whatever was played."""
    module = Module("m")

    @module.on(Placed)
    async def place(event: Placed, tx: Transaction[SQLiteSession]) -> None:
        await tx.session.execute("INSERT INTO placed VALUES (?)", (event.number,))

    for seed in range(15):
        store = SQLiteStore(tmp_path / f"{seed}.db", synchronous="normal")
        async with harness(
            EventBus(module, name="shop", routes={"e.*": "store"}, store=store), mode="rehearsal", seed=seed
        ) as t:
            async with t.bus.transaction() as tx:
                await tx.session.execute("CREATE TABLE placed (number INTEGER)")
            for number in range(3):
                await t.publish(Placed(number=number))
            await t.settled()
            async with t.bus.transaction() as tx:
                rows = await tx.session.fetchall("SELECT number FROM placed ORDER BY number")
            assert rows == [(0,), (1,), (2,)]
