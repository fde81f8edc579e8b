"""The command line, as programs of their own: each command on the example shop, and workers that end in every way."""

import argparse
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest
import redis
import trio
import trio.testing

from eventbus._commands import _paced
from eventbus._screen import progress
from eventbus.cli import main, parser
from tests.programs import Program
from tests.servers.server import Server

ROOT = Path(__file__).parents[1]
SHOP = "shop.app:bus"
PAGE = ROOT / "docs" / "guides" / "command-line.md"

PLACE = """
import anyio, sys
from shop.app import bus
from shop.database import make_tables
from shop.messages import PlaceOrder, SwitchEmail

async def main(orders, works):
    async with bus.running(consume=False):
        await make_tables(bus)
        await bus.send(SwitchEmail(works=bool(works)))
        for number in range(orders):
            await bus.send(PlaceOrder(customer="ada@example.org", sku=f"mug {number}"))

anyio.run(main, *map(int, sys.argv[1:]))
"""

SLOW = """
import os
import time
import anyio
from fastapi import FastAPI
from eventbus import Event, EventBus, Limits, Module
from eventbus.fastapi import install

class Woken(Event, name="slow.woken"):
    pass

slow = Module("slow")
threads = Module("threads")

@slow.on(Woken)
async def sleep(event: Woken) -> None:
    print("sleeps", flush=True)
    await anyio.sleep(60)

@threads.on(Woken)
def block(event: Woken) -> None:
    print("blocks", flush=True)
    time.sleep(60)

limits = Limits(drain=float(os.environ.get("SLOW_DRAIN", "1")))
bus = EventBus(slow, threads, name="slow", store="sqlite:///slow.db", routes={Woken: "store"}, limits=limits)
app = FastAPI()
install(app, bus, consume=False)
broken = EventBus(slow, name="slow", routes={Woken: "nowhere"})

async def main() -> None:
    async with bus.running(consume=False):
        await bus.publish(Woken(), atomic=False)

if __name__ == "__main__":
    anyio.run(main)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return the directory in which the programs run, with their databases."""
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("SHOP_STORE", "EVENTBUS_CONFIG")}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "docs" / "examples")])}


def run(place: Path, *words: str, code: int = 0) -> str:
    """Run a command, which must end with a code; return what it printed, its errors if the code is not 0."""
    command = [sys.executable, "-m", "eventbus.cli", *words]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=place, env=environment(), timeout=40
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr if code else done.stdout


Call = Callable[..., str]


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return what runs a command as ``run`` does, but faster: here, with the application imported anew."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [str(place), str(ROOT / "docs" / "examples"), *sys.path])
    for name in ("SHOP_STORE", "EVENTBUS_CONFIG"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str, code: int = 0) -> str:
        for name in list(sys.modules):
            if name.partition(".")[0] in ("shop", "slow", "sold"):
                monkeypatch.delitem(sys.modules, name)
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr()
        assert ended.value.code == code, printed
        return printed.out + printed.err if code else printed.out

    return call


def python(place: Path, *words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, cwd=place, env=environment(), timeout=40)


def rows(place: Path, statement: str, file: str = "shop.db") -> list[Any]:
    connection = sqlite3.connect(place / file)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def until(true: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Return what becomes true, or fail."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not become true")


@contextmanager
def worker(place: Path, *words: str) -> Iterator[Program]:
    """Start a worker, and see that it is gone at the end."""
    log = place / f"log {time.monotonic()}"
    program = Program("-m", "eventbus.cli", "worker", *words, place=place, log=log, env=environment(), patience=30.0)
    try:
        yield program
    finally:
        program.process.kill()
        program.process.wait()


def waiting(place: Path) -> int:
    return int(rows(place, "SELECT count(*) FROM eventbus_entry WHERE state = 0")[0][0])


def options(start: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Yield each command with its options."""
    inner = [action for action in start._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for one in action.choices.values():
            yield from options(one)
    if not inner:
        yield start.prog, [name for action in start._actions for name in action.option_strings if name.startswith("--")]


def test_page_tells_all() -> None:
    """Each command has its part of the page, and each of its options a word there; no other options are told of."""
    page = PAGE.read_text()
    told = dict(options(parser()))
    for command, names in told.items():
        part = re.search(rf"(?ms)^#+ `{re.escape(command)}\b.*?(?=^#|\Z)", page)
        assert part is not None, command
        for name in set(names) - {"--help"}:
            assert f"`{name}" in part[0], f"{command} {name}"
    known = {name for names in told.values() for name in names}
    assert set(re.findall(r"--[a-z-]+\b", page)) <= known


def test_import_is_light(place: Path) -> None:
    """The command line loads nothing heavy before a command needs it."""
    code = "import eventbus.cli, sys; print(*sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=place, env=environment()
    ).stdout.split()
    heavy = {
        "rich",
        "sqlite3",
        "sqlalchemy",
        "fastapi",
        "subprocess",
        "uvloop",
        "eventbus.engine",
        "eventbus.supervisor",
    }
    assert heavy & set(printed) == set()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "run handlers until SIGTERM"),
        (["dead"], 2, "handle dead messages again"),
        (["check"], 2, "the application stands last"),
        (["check", "slow"], 2, "write module:name"),
        (["check", "nonesuch:bus"], 2, "no module 'nonesuch'"),
        (["check", "slow:bsu"], 2, "did you mean 'bus'"),
        (["check", "slow:Woken"], 2, "neither an EventBus nor an application"),
        (["check", "a", "slow:bus"], 2, "too many words"),
        (["check", "--jsn", "slow:bus"], 2, "unknown: --jsn"),
        (["check", "slow:broken"], 1, "unknown transport 'nowhere'"),
        (["worker", "--reload-dir", "nowhere", "slow:bus"], 2, "--reload-dir nowhere: there is no such directory"),
        (["worker", "--processes", "0", "slow:bus"], 2, "whole number from 1"),
        (["explain", "shop.nonesuch", "slow:bus"], 1, "no message is registered"),
        (["health", "slow:broken"], 2, "has no store"),
        (["forget", "slow.sleep", "slow:bus"], 2, "would announce it again"),
        (["ddl", "slow:bus"], 2, "--dialect"),
        (["ddl", "--dialect", "nonesuch", "slow:bus"], 2, "no tables for 'nonesuch'"),
        (["dead", "replay", "slow:bus"], 2, "say which to replay"),
        (["dead", "list", "--since", "soon", "slow:bus"], 2, "takes a time"),
        (["dead", "show", "nonesuch", "slow:bus"], 1, "no dead message has the id"),
        (["dead", "replay", "--rate", "0/s", "--type", "x", "slow:bus"], 2, "takes a rate"),
        (["dead", "replay", "--rate", "9/y", "--type", "x", "slow:bus"], 2, "takes a rate"),
        (["check", "--write", "slow:bus"], 2, "--snapshot names.json --write"),
        (["check", "--snapshot", "names.json", "slow:bus"], 2, "there is no names.json: --write makes it"),
        (["check", "--snapshot", "slow.py", "slow:bus"], 2, "slow.py is no snapshot"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(call: Call, words: list[str], code: int, says: str) -> None:
    """What cannot be done ends with its own exit code and one sentence."""
    assert says in call(*words, code=code)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["worker", "slow:broken"], 1, "unknown transport 'nowhere'"),
        (["worker", "--only", "paymnts", SHOP], 2, "did you mean payments?"),
        (["worker", "--processes", "2", "slow:broken"], 1, "unknown transport 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_worker_that_cannot_start(place: Path, words: list[str], code: int, says: str) -> None:
    """A worker that cannot start says why, without a traceback, and is not started again."""
    printed = run(place, *words, code=code)
    assert says in printed
    assert "Traceback" not in printed


def test_store_that_fails(place: Path, call: Call) -> None:
    """A store that cannot be used has an exit code of its own."""
    (place / "shop.db").write_text("this is no database" * 1000)
    assert "eventbus: " in call("health", SHOP, code=3)


def test_what_the_shop_is(place: Path, call: Call) -> None:
    """Commands that look at the wiring print it for people and for programs, by the bus or by the application."""
    assert run(place, "check", SHOP) == "all is well\n"
    assert json.loads(call("check", "--offline", "--json", "shop.app:app")) == {
        "ok": True,
        "faults": [],
        "notes": [],
    }
    assert call("explain", "shop.order_placed", SHOP).startswith("bus shop: 1 message\nevent shop.order_placed")
    (facts,) = json.loads(call("explain", "--json", "shop.order_placed", SHOP))["messages"]
    assert facts["route"] == ["store"]
    assert "command shop.place_order" in call("topology", SHOP)
    assert len(json.loads(call("topology", SHOP, "--json"))["messages"]) == 8
    drawn = call("topology", "--mermaid", SHOP)
    assert drawn.startswith("flowchart LR\n")
    assert '["payments.charge_payment"]' in drawn
    assert call("ddl", "--dialect", "postgresql", SHOP).startswith("CREATE TABLE eventbus_entry (")


SOLD = """
from eventbus import Event, EventBus, Module

class Sold(Event, name="m.sold"):
    number: int

module = Module("m")

@module.on(Sold)
async def note(event: Sold) -> None: ...

bus = EventBus(module, name="svc", transports={"events": "%s"}, routes={"m.*": "events"})
"""


def test_topology_is_made(place: Path, call: Call, valkey: Server) -> None:
    """What is missing at a broker is made when asked for, and only then."""
    (place / "sold.py").write_text(SOLD % valkey.url)
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
        call("topology", "sold:bus")
        assert client.keys() == []
        for _ in range(2):
            assert "event m.sold -> events" in call("topology", "--declare", "sold:bus")
            (stream,) = client.scan_iter(_type="stream")
            assert [one["name"] for one in client.xinfo_groups(stream)] == [b"svc/m.note"]
    (place / "sold.py").write_text(SOLD % "redis://127.0.0.1:1/")
    assert "127.0.0.1:1" in call("topology", "--declare", "sold:bus", code=3)


def test_documents(call: Call) -> None:
    """The documents of all messages are printed as JSON."""
    document = json.loads(call("asyncapi", "--version", "7", SHOP))
    assert document["info"] == {"title": "shop", "version": "7"}
    assert document["channels"].keys() == json.loads(call("schema", "--json", "shop.app:app")).keys()


def test_configuration_by_variable(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deployment moves a message by naming a file."""
    (place / "eventbus.toml").write_text('[routes]\n"shop.order_placed" = "memory"\n')
    moved = subprocess.run(
        [sys.executable, "-m", "eventbus.cli", "explain", "shop.order_placed", SHOP],
        check=True, capture_output=True, text=True, cwd=place, env=environment() | {"EVENTBUS_CONFIG": "eventbus.toml"},
    )  # fmt: skip
    assert "-> memory (routes['shop.order_placed'] in configuration)" in moved.stdout


def test_orphans(place: Path, call: Call) -> None:
    """What waits for a handler that the application no longer has is found by ``check`` and ended by ``forget``."""
    python(place, "-c", PLACE, "2", "1")
    connection = sqlite3.connect(place / "shop.db")
    with connection:
        connection.execute("UPDATE eventbus_entry SET recipient = 'shop/old.gone' WHERE lane IS NOT NULL")
        connection.execute("UPDATE eventbus_subscription SET name = 'shop/old.gone' WHERE name LIKE '%charge%'")
    assert "shop/old.gone: 2 wait and this application has no such handler" in call("check", SHOP, code=1)
    assert json.loads(call("health", "--json", SHOP))["healthy"] is True
    with connection:
        connection.execute("DELETE FROM eventbus_subscription WHERE name = 'shop/old.gone'")
    connection.close()
    assert json.loads(call("health", "--json", SHOP, code=1))["healthy"] is False
    assert json.loads(call("forget", "--json", "old.gone", SHOP)) == {"handler": "shop/old.gone", "dead": 2}
    assert call("check", SHOP).endswith("all is well\n")
    assert "shop/notifications.send_email" in call("health", SHOP)


def test_names_that_changed(place: Path, call: Call) -> None:
    """A name that was in a snapshot and is gone, or means something else, is a fault that says what to do."""
    seen = ["check", "--snapshot", "names.json", SHOP]
    call("check", "--write", *seen[1:])
    assert call(*seen) == "all is well\n"
    names = json.loads((place / "names.json").read_text())
    assert names["messages"]["shop.order_placed"] == {"kind": "event", "version": 1, "key": "order_id"}
    handlers, messages = names["handlers"], names["messages"]
    handlers["payments.charge"] = handlers.pop("payments.charge_payment")
    messages["shop.order_paid"] = messages.pop("shop.order_charged")
    messages["shop.order_placed"] |= {"version": 2, "key": "customer"}
    messages["shop.place_order"]["kind"] = "event"
    (place / "names.json").write_text(json.dumps(names))
    told = json.loads(call("check", "--json", *seen[1:], code=1))
    assert [fault.partition(" since ")[0].partition(":")[0] for fault in told["faults"]] == [
        "handler payments.charge is gone",
        "message shop.order_placed went back from version 2 to 1",
        "message shop.order_placed has changed its key from customer to order_id",
        "message shop.place_order has changed its kind from event to command",
        "message shop.order_paid is gone",
    ]
    assert "add aliases=['payments.charge']" in told["faults"][0]
    assert "run `eventbus forget payments.charge`" in told["faults"][0]
    assert [note.split()[0] for note in told["notes"]] == ["payments.charge_payment", "shop.order_charged"]
    call("check", "--write", *seen[1:])
    assert call(*seen) == "all is well\n"


def test_alias_answers_for_a_name(place: Path, call: Call) -> None:
    """A former name in ``aliases=`` is no fault."""
    call("check", "--offline", "--write", "--snapshot", "names.json", "slow:bus")
    (place / "slow.py").write_text(SLOW.replace("async def sleep(", "async def doze("))
    assert "handler slow.sleep is gone" in call("check", "--snapshot", "names.json", "slow:bus", code=1)
    mended = SLOW.replace("async def sleep(", "async def doze(").replace(
        "@slow.on(Woken)", "@slow.on(Woken, aliases=['sleep'])"
    )
    (place / "slow.py").write_text(mended)
    assert "note: slow.doze is new" in call("check", "--snapshot", "names.json", "slow:bus")


def test_handlers_that_nothing_reaches(place: Path, call: Call) -> None:
    """A handler that nobody has announced yet, and one that is announced and not here, are told of."""
    python(place, "-c", PLACE, "0", "1")
    connection = sqlite3.connect(place / "shop.db")
    with connection:
        connection.execute("UPDATE eventbus_subscription SET name = 'shop/old.gone' WHERE name LIKE '%charge%'")
    connection.close()
    notes = json.loads(call("check", "--json", SHOP))["notes"]
    assert [note.partition(":")[0] for note in notes] == [
        "shop/old.gone gets messages and this application has no such handler",
        "shop/payments.charge_payment is announced by nobody yet",
    ]


def test_orphans_on_their_way_out(place: Path, call: Call) -> None:
    """What waits for a transport that the application no longer has is found, and ended by its own name."""
    python(place, "-c", PLACE, "1", "1")
    with sqlite3.connect(place / "shop.db") as connection:
        connection.execute("UPDATE eventbus_entry SET recipient = 'shop>gone' WHERE recipient LIKE '%charge%'")
    connection.close()
    assert "shop>gone: 1 wait and this bus has no such transport: name it" in call("check", SHOP, code=1)
    report = json.loads(call("health", "--json", SHOP, code=1))
    assert ["shop>gone: 1 wait and this bus has no such transport"] == report["faults"]
    assert "would go on with it" in call("forget", "shop>memory", SHOP, code=2)
    assert json.loads(call("forget", "--json", "shop>gone", SHOP)) == {"handler": "shop>gone", "dead": 1}
    assert call("check", SHOP) == "all is well\n"


def test_lag(place: Path, call: Call) -> None:
    """A due message that waits for longer than it may is no good health."""
    python(place, "-c", PLACE, "1", "1")
    time.sleep(1.1)  # an age is what it is about
    assert call("health", SHOP).endswith("well\n")
    shown = call("health", "--lag", "1s", SHOP, code=1)
    assert "NOT WELL\n" in shown
    assert "the first has been due for " in shown


def test_the_dead(place: Path, call: Call) -> None:
    """The dead are listed, shown, chosen by filters, replayed and discarded."""
    python(place, "-c", PLACE, "4", "0")
    with worker(place, "--only", "notifications.send_email", SHOP) as one:
        until(lambda: rows(place, "SELECT count(*) FROM eventbus_entry WHERE state = 2") == [(4,)])
        assert one.end(signal.SIGTERM) == 0
    assert rows(place, "SELECT count(*) FROM stock") == [(0,)]  # of the others nothing was run
    found = json.loads(call("dead", "list", "--json", SHOP))
    ids = [one["id"] for one in found]
    assert {(one["handler"], one["failures"]) for one in found} == {("shop/notifications.send_email", 3)}
    assert call("dead", "list", SHOP, "--limit", "2").count("mail server refuses") == 2
    assert call("dead", "list", SHOP, "--limit", "4").endswith("the oldest 4; --limit shows more\n")
    for nobody in (["--type", "x"], ["--handler", "x"], ["--since", "2999-01-01"], ["--error", "nonesuch"]):
        assert call("dead", "list", *nobody, SHOP) == "none\n"
    some = [
        "--type",
        "shop.order_placed",
        "--handler",
        "notifications.send_email",
        "--since",
        "1h",
        "--error",
        "refuses",
    ]
    assert len(json.loads(call("dead", "list", "--json", *some, SHOP))) == 4
    assert '"sku":"mug ' in call("dead", "show", ids[0], SHOP)
    assert json.loads(call("dead", "show", "--json", ids[0], SHOP))["id"] == ids[0]
    dry = json.loads(call("dead", "discard", ids[0], "--dry-run", ids[1], "--json", SHOP))
    assert [one["id"] for one in dry] == ids[:2]
    assert "discard --dry-run: 4 message(s), and nothing is done" in call("dead", "discard", "--dry-run", *some, SHOP)
    assert call("dead", "discard", ids[0], SHOP) == "discard: 1 message(s)\n"
    assert call("dead", "discard", ids[0], SHOP) == "discard: 0 message(s)\n"
    assert len(json.loads(call("dead", "replay", "--dry-run", "--json", *some, SHOP))) == 3
    assert json.loads(call("dead", "replay", "--limit", "1", "--json", *some, SHOP)) == {"replay": 1}
    assert call("dead", "replay", "--handler", "notifications.send_email", SHOP) == "replay: 2 message(s)\n"
    assert call("dead", "list", SHOP) == "none\n"


def test_two_operators_at_once(place: Path) -> None:
    """Of two who replay, and of two of whom one discards, each dead message is had by one."""
    python(place, "-c", PLACE, "300", "1")
    connection = sqlite3.connect(place / "shop.db", timeout=30)
    dying = "UPDATE eventbus_entry SET state = 2, error = 'x', failures = 5 WHERE recipient LIKE '%send_email'"
    for verbs in (("replay", "replay"), ("replay", "discard")):
        with connection:
            connection.execute(dying)
        command = [sys.executable, "-m", "eventbus.cli", "dead"]
        some = ["--json", "--rate", "400/s", "--error", "x", SHOP]
        both = [
            subprocess.Popen([*command, verb, *some], stdout=subprocess.PIPE, cwd=place, env=environment())
            for verb in verbs
        ]
        told = [json.loads(one.communicate(timeout=40)[0]) for one in both]
        assert sum(count for one in told for count in one.values()) == 300
        states = dict(
            rows(place, "SELECT state, count(*) FROM eventbus_entry WHERE recipient LIKE '%send%' GROUP BY 1")
        )
        assert states.get(0, 0) == sum(one.get("replay", 0) for one in told)
        assert 2 not in states
    connection.close()


def test_rate() -> None:
    """Of dead messages no more are taken in a time than the rate allows, and all are."""

    async def take() -> list[tuple[float, int]]:
        start, ids = trio.current_time(), [str(number) for number in range(100)]
        return [(trio.current_time() - start, len(piece)) async for piece in _paced(ids, 20.0)]

    assert trio.run(take, clock=trio.testing.MockClock(autojump_threshold=0)) == [
        (place / 20, 5) for place in range(0, 100, 5)
    ]


class Terminal(io.StringIO):
    """Be a screen."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_progress(monkeypatch: pytest.MonkeyPatch, absent: Callable[[str], NoReturn], rich: bool) -> None:
    """At a terminal a bar grows, by rich or without."""
    if rich and find_spec("rich") is None:
        absent("no rich: pip install rich")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    if not rich:
        monkeypatch.setenv("NO_COLOR", "1")
    with progress("replay", 10) as advance:
        advance(5)
        advance(5)
    if rich:
        assert "100%" in screen.getvalue()
    else:
        assert screen.getvalue().endswith(f"replay [{'#' * 15}{'.' * 15}] 5/10\rreplay [{'#' * 30}] 10/10\n")


def test_worker_drains(place: Path) -> None:
    """SIGTERM under load fails nothing and leaves nothing leased, and the next worker does the rest."""
    python(place, "-c", PLACE, "40", "1")
    with worker(place, "--alive", "alive", "--concurrency", "2", "shop.app:app") as one:
        one.says(r"worker \d+ runs 3 source")
        until((place / "alive").exists)
        until(lambda: rows(place, "SELECT count(*) FROM stock") > [(2,)])
        assert one.end(signal.SIGTERM) == 0
        assert "drains" in one.log
    assert not (place / "alive").exists()
    left = waiting(place)
    assert left > 0
    assert rows(place, "SELECT count(*) FROM eventbus_entry WHERE failures > 0 OR owner IS NOT NULL AND state = 0") == [
        (0,)
    ]
    with worker(place, SHOP) as two:
        until(lambda: waiting(place) == 0)
        assert two.end(signal.SIGINT) == 0
    for table in ("stock", "payments", "emails"):
        assert rows(place, f"SELECT count(*), count(DISTINCT order_id) FROM {table}") == [(40, 40)]


def test_killed_process_is_replaced(place: Path) -> None:
    """One of two processes that is killed with -9 is started again, and nothing is lost."""
    python(place, "-c", PLACE, "40", "1")
    with worker(place, "--processes", "2", "--alive", "alive", SHOP) as crew:
        first, _ = crew.says(r"worker (\d+) runs", 2)
        until(lambda: rows(place, "SELECT count(*) FROM stock") > [(0,)])
        os.kill(int(first), signal.SIGKILL)
        crew.says(r"worker (\d+) runs", 3)
        until(lambda: waiting(place) == 0)
        assert {file.name for file in place.glob("alive*")} == {"alive.0", "alive.1"}
        assert crew.end(signal.SIGTERM) == 0
    for table in ("stock", "payments"):
        assert rows(place, f"SELECT count(*), count(DISTINCT order_id) FROM {table}") == [(40, 40)]


def test_processes_end_with_their_parent(place: Path) -> None:
    """Worker processes whose parent was killed with -9 end by themselves."""
    with worker(place, "--processes", "2", SHOP) as crew:
        children = crew.says(r"worker (\d+) runs", 2)
        crew.end(signal.SIGKILL)
        until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def touch(file: Path, text: str) -> None:
    """Write a Python file as somebody does who works on it: a moment later than before."""
    file.write_text(text)
    seen = file.stat().st_mtime_ns
    os.utime(file, ns=(seen + 2_000_000_000, seen + 2_000_000_000))  # byte code is told apart by whole seconds


def test_reload(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed file drains a worker and starts it anew, also after one that cannot be imported; others do not."""
    monkeypatch.setenv("SLOW_DRAIN", "600")
    application = place / "slow.py"
    touch(application, SLOW.replace("anyio.sleep(60)", "anyio.sleep(1)"))
    python(place, "slow.py")
    with worker(place, "--reload", "--only", "slow", "slow:app") as one:
        one.says("sleeps")
        touch(application, SLOW.replace("anyio.sleep(60)", "anyio.sleep(2)"))
        one.says("slow.py changed: all workers drain and start anew")
        one.says(r"worker (\d+) runs", 2)
        drained = re.search("(?s)changed.*drains.*is gone.*runs", one.log)
        assert drained is not None, one.log
        entries = rows(place, "SELECT failures, state FROM eventbus_entry WHERE recipient LIKE '%sleep'", "slow.db")
        assert entries == [(0, 1)]  # what was running was let finish
        touch(application, "this is no Python")
        one.says("cannot work: the next one starts when a file changes")
        (place / ".venv").mkdir()
        touch(place / ".venv" / "other.py", "")
        touch(place / "notes.txt", "")
        touch(application, SLOW)
        one.says(r"worker (\d+) runs", 3)
        assert set(re.findall(r"(\S+) changed", one.log)) == {"slow.py"}
        assert one.end(signal.SIGINT) == 0


def test_reload_of_another_directory(place: Path) -> None:
    """Only the directories that were named are looked at, and all processes start anew."""
    (place / "library").mkdir()
    with worker(place, "--processes", "2", "--reload-dir", "library", "--only", "slow", "slow:bus") as crew:
        crew.says(r"worker (\d+) runs", 2)
        touch(place / "slow.py", SLOW)
        touch(place / "library" / "new.py", "")
        crew.says(r"worker (\d+) runs", 4)
        assert re.findall(r"(\S+) changed", crew.log) == ["library/new.py"]
        assert crew.end(signal.SIGTERM) == 0


def test_second_signal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal ends a worker at once, and what it was doing is handed back and not failed."""
    monkeypatch.setenv("SLOW_DRAIN", "600")
    python(place, "slow.py")
    with worker(place, "--only", "slow", "slow:app") as one:
        one.says("sleeps")
        assert "blocks" not in one.log
        one.process.send_signal(signal.SIGTERM)
        one.says("drains")
        assert one.end(signal.SIGTERM) == 128 + signal.SIGTERM
    entries = rows(
        place, "SELECT failures, owner, state FROM eventbus_entry WHERE recipient = 'slow/slow.sleep'", "slow.db"
    )
    assert entries == [(0, None, 0)]


def test_thread_that_does_not_end(place: Path) -> None:
    """A thread that outlasts the drain is named, and does not hold the process; it has not failed."""
    python(place, "slow.py")
    with worker(place, "--only", "threads.block", "slow:bus") as one:
        one.says("blocks")
        assert one.end(signal.SIGTERM) == 124
        assert "still running: slow/threads.block (1)" in one.log
    entries = rows(
        place, "SELECT failures, state FROM eventbus_entry WHERE recipient = 'slow/threads.block'", "slow.db"
    )
    assert entries == [(0, 0)]


def test_screen_is_safe(place: Path, call: Call) -> None:
    """Control characters of an error neither colour nor move what is on the screen."""
    python(place, "-c", PLACE, "1", "1")
    connection = sqlite3.connect(place / "shop.db")
    with connection:
        connection.execute("UPDATE eventbus_entry SET state = 2, error = char(27) || '[31mred' || char(13) || 'x'")
    connection.close()
    printed = call("dead", "list", SHOP)
    assert "\x1b" not in printed
    assert "\\x1b[31mred\\rx" in printed
