"""Prove what an operator relies on: drains under load, killed processes, servers that reload and that fork."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import httpx
import pytest

from eventbus import EventBus, Module
from tests.crash.served import LINGERING, SLOTS, Made, make
from tests.crash.site import Ledger, Site
from tests.programs import Program
from tests.servers.server import HOST, free_port, wait_until

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
DRAIN = 4.0
"""A twentieth of it is for handing back: enough for a busy machine."""
RESERVE = 2.0
"""Seconds after the time to drain in which a worker process is gone."""
CLIENTS = 4


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    """Return the stores that servers and workers of many processes are run on."""
    kind: str = request.param
    if kind == "sqlite":
        file = tmp_path / "served.db"
        site = Site(tmp_path, f"sqlite:///{file}", f"sqlite+aiosqlite:///{file}")
    else:
        url = request.getfixturevalue("postgres_url")
        site = Site(tmp_path, f"{url}?create=true", url, request.getfixturevalue("postgres"))
    site.prepare()
    return site


Start = Callable[..., Program]


@pytest.fixture
def start(place: Site) -> Iterator[Start]:
    """Return what starts a Python program at the place; its processes are gone at the end."""
    programs: list[Program] = []

    def start(*words: str, **environment: object) -> Program:
        log = place.directory / f"log {len(programs)}"
        told = {f"SERVED_{name.upper()}": str(value) for name, value in environment.items()}
        kept = {name: value for name, value in os.environ.items() if name != "EVENTBUS_CONFIG"}
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(place.directory)]), "PYTHONUNBUFFERED": "1"}
        where = {"SERVED_STORE": place.store, "SERVED_DIRECTORY": str(place.directory)}
        env = kept | paths | where | told
        programs.append(Program(*words, place=place.directory, log=log, env=env, start_new_session=True))
        return programs[-1]

    yield start
    for one in programs:
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)  # with its children
        one.process.wait(10)


def worker(start: Start, *words: str, **environment: object) -> Program:
    return start("-m", "eventbus.cli", "worker", *words, "tests.crash.served:bus", **environment)


def publish(place: Site, first: int, count: int) -> None:
    """Make something many times, beside those that handle it."""
    bus = EventBus(Module("served", messages=[Made]), name="served", store=place.store, routes={Made: "store"})

    async def main() -> None:
        async with bus.running(consume=False):
            for number in range(first, first + count):
                await make(bus, number)

    anyio.run(main)


def waiting(place: Site) -> int:
    return int(place.rows("SELECT count(*) FROM eventbus_entry WHERE state = 0")[0][0])


def mailed(place: Site) -> int:
    return len(place.lines("mail.txt"))


def audited(place: Site, failures: int = 0) -> Ledger:
    """Return what is left, when everything is done and nothing has failed."""
    found = place.rows(f"SELECT failures, state, error FROM eventbus_entry WHERE failures > {failures} OR state <> 1")
    assert found == []
    ledger = place.audit()
    assert Ledger(made=ledger.made, repeated=ledger.repeated) == ledger
    return ledger


@pytest.mark.timeout(3600)
def test_drains(place: Site, start: Start, drains: int) -> None:
    """A loaded worker is gone within the time to drain and two seconds; nothing has failed, and others go on with it.

    The lease is far longer than the test: what is not handed back would be missing at its end.
    """
    times: list[float] = []
    one = worker(start, linger=60, drain=DRAIN)
    one.says(r"worker \d+ runs")
    for turn in range(drains):
        publish(place, turn * LINGERING, LINGERING)
        two = worker(start, linger=60, drain=DRAIN)
        two.says(r"worker \d+ runs")
        wait_until(lambda: mailed(place) > 0, 60, "nothing was handled")
        asked = time.monotonic()
        assert one.end() == 0, one.log  # and not 124, which is that it had to be ended
        times.append(time.monotonic() - asked)
        assert place.rows("SELECT failures, state, error FROM eventbus_entry WHERE failures > 0 OR state = 2") == []
        one = two
    assert one.end() == 0, one.log
    assert place.rows("SELECT count(*) FROM eventbus_entry WHERE owner IS NOT NULL AND state = 0") == [(0,)]
    left = waiting(place)
    last = worker(start)
    wait_until(lambda: waiting(place) == 0, 120, lambda: f"{waiting(place)} still wait")
    assert last.end() == 0
    ledger = audited(place)
    print(f"\n{drains} drains, the longest {max(times):.2f} s of {DRAIN + RESERVE:g}; {left} left over; {ledger}")
    assert ledger.made == drains * LINGERING
    assert ledger.repeated == 0  # who was cut had not come to the end
    assert left >= drains  # the lingering ones: each drain had something to cut
    assert max(times) < DRAIN + RESERVE + 5  # wide: it is the machine's time too


def test_killed_among_four(place: Site, start: Start, touches: int) -> None:
    """Of four worker processes one after the other is killed with -9 under load; others go on, and nothing is lost."""
    crew = worker(start, "--processes", "4", lease=3, pace=0.2, linger=0.2)
    crew.says(r"worker (\d+) runs", 4)
    killed = set[str]()
    for turn in range(touches):
        publish(place, turn * 100 + 1, 100)
        alive = [pid for pid in crew.says(r"worker (\d+) runs", 4 + turn) if pid not in killed]
        killed.add(alive[turn % 4])
        os.kill(int(alive[turn % 4]), signal.SIGKILL)
    crew.says(r"worker (\d+) runs", 4 + touches)
    wait_until(lambda: waiting(place) == 0, 120, lambda: f"{waiting(place)} still wait\n{crew.log}")
    assert crew.end() == 0
    ledger = audited(place, failures=100)  # on a slow machine a short lease makes short timeouts
    print(f"\n{touches} kills: {ledger}")
    assert ledger.made == touches * 100
    assert ledger.repeated <= touches * SLOTS


@contextmanager
def serving(start: Start, *words: str) -> Iterator[tuple[Program, str]]:
    """Start a server and yield it with its address; ``{}`` in its words is the port."""
    port = free_port()
    server = start(*(word.format(port) for word in words))
    address = f"http://{HOST}:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{address}/openapi.json").status_code == 200
        except httpx.TransportError:
            return server.process.poll() is not None

    wait_until(answers, 60, lambda: server.log)
    yield server, address
    assert server.process.poll() is None, server.log
    server.end()


def post(place: Site, address: str, numbers: range) -> set[int]:
    """Make something many times, asking again on a lost connection under another number; return who answered."""
    told = set[int]()
    with httpx.Client(base_url=address, timeout=30) as client, (place.directory / "acked.txt").open("a") as acked:
        for number in numbers:
            try:
                answer = client.post(f"/made/{number}")
            except httpx.TransportError:  # the server is being started anew
                time.sleep(0.05)
                continue
            if answer.status_code == 201:
                acked.write(f"{number}\n")
                told.add(answer.json())
    return told


def test_uvicorn_reload(place: Site, start: Start, touches: int) -> None:
    """A server that is reloaded again and again under load loses nothing, and runs nothing twice."""
    file = place.directory / "reloaded.py"
    file.write_text("from tests.crash.served import app as app\n")
    words = ("-m", "uvicorn", "reloaded:app", "--reload", "--port", "{}", "--host", HOST)
    with serving(start, *words) as (server, address):
        for turn in range(touches):
            post(place, address, range(turn * 50 + 1, turn * 50 + 41))
            file.write_text(f"from tests.crash.served import app as app\n# {turn}\n")
            post(place, address, range(turn * 50 + 41, turn * 50 + 51))
            server.says("Application startup complete", turn + 2)
        wait_until(lambda: waiting(place) == 0, 120, lambda: f"{waiting(place)} still wait\n{server.log}")
    ledger = audited(place)
    print(f"\n{touches} reloads: {ledger}")
    assert ledger.made >= touches * 40
    assert ledger.repeated == 0


SERVERS = {
    "uvicorn": ("-m", "uvicorn", "tests.crash.served:app", "--workers", "4", "--port", "{}", "--host", HOST),
    "gunicorn": ("-m", "gunicorn", "tests.crash.served:app", "--preload", "-w", "4", "-k", "asgi", "-b", HOST + ":{}"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_processes_of_a_server(place: Site, start: Start, name: str) -> None:
    """Several processes of one server, forked off or not, share the work: nothing runs twice, nothing is stuck."""
    with serving(start, *SERVERS[name]) as (server, address):
        answered = set[int]()
        for turn in range(CLIENTS * 3):  # a connection each, so that all processes have some
            answered |= post(place, address, range(turn * 25 + 1, turn * 25 + 26))
        wait_until(lambda: waiting(place) == 0, 120, lambda: f"{waiting(place)} still wait\n{server.log}")
    ledger = audited(place)
    handled = {line[2] for line in place.lines("mail.txt")}
    print(f"\n{name}: answered by {len(answered)}, handled by {len(handled)}: {ledger}")
    assert ledger.made == CLIENTS * 75
    assert ledger.repeated == 0
    assert len(handled) > 1
