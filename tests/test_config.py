"""Configuration: what a file says beats the code, what is wrong has a line, and what is secret is never shown."""

import traceback
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus import ConfigurationError, Event, EventBus, Limits, MissingExtraError, Module
from eventbus.config import masked, override, read
from eventbus.stores.memory import MemoryStore
from eventbus.stores.sqlite import SQLiteStore
from eventbus.transports.memory import MemoryTransport

CANARY = "c4n4ry-s3cret"


class Paid(Event, name="shop.paid"):
    order: int


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory, with no configuration around."""
    monkeypatch.delenv("EVENTBUS_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "bus.toml") -> str:
    Path(name).write_text(text)
    return name


def shop(config: str | None, **parts: object) -> EventBus:
    module = Module("shop", messages=[Paid])
    return EventBus(module, name="shop", config=config, **parts)  # type: ignore[arg-type]


def faults(text: str, **environment: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        read(write(text), environment)
    return list(caught.value.faults)


def refused(text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        shop(write(text))
    return list(caught.value.faults)


def test_file_beats_code() -> None:
    """Store, transports, routes and limits of the file replace those of the code; what it leaves out stays."""
    path = write(
        'store = "sqlite:///moved.db"\n[transports]\nevents = "memory://"\n[routes]\n"shop.*" = "store"\n'
        "[limits]\nlease = 12\nbatch = 7\n"
    )
    kept = MemoryTransport()
    bus = shop(path, store="memory://", transports={"old": kept}, routes={Paid: "memory"}, limits=Limits(sweep=1.0))
    assert isinstance(bus.wiring.store, SQLiteStore)
    assert set(bus.wiring.transports) == {"old", "events", "memory"}
    assert bus.wiring.transports["old"] is kept
    assert (bus.limits.lease, bus.limits.batch, bus.limits.sweep) == (12, 7, 1.0)
    assert bus.explain(Paid).messages[0].route == ("store",)
    assert "in configuration" in bus.explain(Paid).messages[0].rule


def test_empty_file_changes_nothing() -> None:
    """A file that says nothing leaves the code as it is."""
    store = MemoryStore()
    bus = shop(write(""), store=store, routes={Paid: "store"})
    assert bus.wiring.store is store
    assert bus.explain(Paid).messages[0].route == ("store",)


def test_variable_names_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """EVENTBUS_CONFIG is read instead of the file that the code names; empty it counts as not set."""
    code, deployed = write("[limits]\nbatch = 1\n"), write("[limits]\nbatch = 2\n", "deployed.toml")
    monkeypatch.setenv("EVENTBUS_CONFIG", deployed)
    assert shop(code).limits.batch == 2
    assert shop(None).limits.batch == 2
    monkeypatch.setenv("EVENTBUS_CONFIG", "")
    assert shop(code).limits.batch == 1


def test_limits_reach_what_is_made() -> None:
    """A store or transport that is made from an address gets the limits of the file."""
    with pytest.raises(ConfigurationError, match="lease"):
        shop(write('store = "memory://"\n[limits]\nlease = -1\n'))
    bus = shop(write('[transports]\nevents = "memory://"\n[limits]\nqueue = 3\n'))
    assert bus.wiring.transports["events"]._limits.queue == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${DB}", "sqlite:///a.db"),
        ("${NONE:-memory://}", "memory://"),
        ("${EMPTY:-memory://}", "memory://"),
        ("memory://${EMPTY}", "memory://"),
        ("a$b$$c$${DB}", "a$b$$c${DB}"),
        ("${TWICE}", "${DB}"),
        ("${DB}${DB}", "sqlite:///a.dbsqlite:///a.db"),
    ],
)
def test_variables(written: str, value: str) -> None:
    """Variables are filled in once, with their default where they are not set or empty."""
    environment = {"DB": "sqlite:///a.db", "EMPTY": "", "TWICE": "${DB}"}
    found = read(write(f"store = '{written}'"), environment).store
    assert found is not None
    assert found.value == value


def test_variables_in_routes_and_limits() -> None:
    """Routes and limits take variables too."""
    found = read(
        write('[routes]\n"a" = ["${TO}"]\n[limits]\nlease = "${L}"\nbatch = "${B:-5}"'), {"TO": "x", "L": "2.5"}
    )
    assert ([one.value for one in found.routes["a"]], found.limits) == (["x"], {"lease": 2.5, "batch": 5})


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('# x\n\nstor = "memory://"', 3, "stor: is no part of a configuration: did you mean 'store'?"),
        ("[limits]\nlease = 1\nswep = 2", 3, "limits.swep: is no limit: did you mean 'sweep'?"),
        ('[limits]\nlease = "1"', 2, "limits.lease: takes a number without quotes"),
        ("[limits]\nlease = true", 2, "limits.lease: takes a number without quotes"),
        ('[limits]\nlease = "${X:-soon}"', 2, "limits.lease: '${X}' does not hold a number"),
        ("store = 1", 1, "store: takes an address in quotes"),
        ('store = ""', 1, "store: is empty"),
        ('store = "${DBURL}"', 1, "the variable DBURL is not set, did you mean DB_URL?"),
        ('store = "${DB"', 1, "store: a variable is written ${NAME} or ${NAME:-default}"),
        ('store = "${1}"', 1, "store: a variable is written ${NAME} or ${NAME:-default}"),
        ("routes = 1", 1, "routes: is a table: write [routes]"),
        ("\n[routes]\nshop.paid = 'store'", 3, """routes.shop: a name with dots stands in quotes: "shop.paid" = ..."""),
        ("[routes]\na = []", 2, "routes.a: takes the name of a transport or a list of them"),
        ("[routes]\na = [\n 'x',\n 1\n]\n", 2, "routes.a: takes the name of a transport or a list of them"),
        ("[routes]\na = 'amqp://guest@host'", 2, "routes.a: takes the name of a transport: an address stands under"),
        ("[transports]\n[transports.events]\nurl = 'x'", 2, "transports.events: takes an address in quotes"),
        ("[transports]\nstore = 'memory://'", 2, "transports.store: is built in"),
        ("a = 1\nb = = 2", 2, "is not TOML"),
        ("a = [", 1, "is not TOML"),
    ],
)
def test_fault_has_a_line(text: str, line: int, says: str) -> None:
    """What cannot be is refused with the file, its line, and what to write instead."""
    (fault,) = faults(text, DB_URL="x")
    assert fault.startswith(f"bus.toml:{line}: ")
    assert says in fault


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("\n[limits]\nlease = -1", 3, "must be greater than zero and finite, not -1"),
        ("[limits]\nbatch = 1.5", 2, "takes a whole number"),
        ('[routes]\n"shop.*" = "evnts"\n[transports]\nevents = "memory://"', 2, "did you mean 'events'?"),
        ('store = "postgressql://x"', 1, "did you mean 'postgresql'?"),
        ('store = "shop.db"', 1, "is no address that anybody here offers (known are"),
        ('store = "sqlite:///a.db?sync=full"', 1, "sqlite:// takes the options synchronous, each once"),
        ('[transports]\nx = "nonesuch://"', 2, "is no address that anybody here offers (known are"),
    ],
)
def test_fault_of_the_whole_has_a_line(text: str, line: int, says: str) -> None:
    """What only the bus can find wrong has its file and line too."""
    (fault,) = refused(text)
    assert fault.startswith(f"bus.toml:{line}: ")
    assert says in fault


def test_all_faults_at_once() -> None:
    """One error lists everything, in the order of the lines."""
    found = faults("[limits]\nlaese = 1\n[routes]\na = 1\n[transports]\nb = 2\n")
    assert [fault.split(":")[1] for fault in found] == ["2", "4", "6"]


@pytest.mark.parametrize("path", ["nonesuch.toml", ".", "a\0b"])
def test_file_that_cannot_be_read(path: str) -> None:
    """A file that is not there, or no file, is an error that names it."""
    with pytest.raises(ConfigurationError, match="cannot be read") as caught:
        shop(path)
    assert path in str(caught.value)


def test_file_that_is_no_text() -> None:
    """Bytes that are no text are refused with their line."""
    Path("bus.toml").write_bytes(b"a = 1\n\xff")
    with pytest.raises(ConfigurationError, match=r"bus.toml:2: is not UTF-8"):
        read("bus.toml")


def test_huge_file() -> None:
    """A file that is no configuration by its size is not taken into memory."""
    with pytest.raises(ConfigurationError, match="larger than"):
        read(write("#" * 2_000_000))


def test_missing_extra_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing library is told with its install line, as it is without a file."""

    def load(path: str) -> None:
        raise MissingExtraError("x", "sqlalchemy")

    monkeypatch.setattr("eventbus._extras.load", load)
    with pytest.raises(MissingExtraError, match="pip install"):
        shop(write('store = "postgresql://x"'))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("amqp://guest:secret@host:5672/vhost", "amqp://***@host:5672/vhost"),
        ("redis://:secret@host", "redis://***@host"),
        ("sqlite:////tmp/shop.db?synchronous=normal", "sqlite:////tmp/shop.db?***"),
        ("amqp://user:se/cret@host", "amqp://***"),
        ("amqp://user:secret", "amqp://***"),
        ("amqp://user:se@cret@host", "amqp://***"),
        ("amqp://host?a=x@secret", "amqp://***"),
        ("secret", "***"),
        ("${URL}", "${URL}"),
        ("${URL:-amqp://u:secret@h}", "${URL}"),
        ("amqp://u:${PW:-secret}@${HOST}:${PORT}/x", "amqp://***@${HOST}:${PORT}/x"),
    ],
)
def test_masked(address: str, shown: str) -> None:
    """An address is shown without what may be secret."""
    assert masked(address) == shown
    assert "secret" not in masked(address)


def told(text: str, **environment: str) -> str:
    """Return everything that anybody could print about a file: its repr, or the error with its traceback."""
    try:
        path = write(text)
        found = read(path, environment)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            override(path, None, {}, Limits())
            bus = shop(path)
        return repr(found) + str(found) + repr(bus)
    except ConfigurationError as error:
        return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize("secret", [CANARY, quote("c4n4ry/s3@cret", safe=""), "c4n4ry:s3@cret/x?y"])
@pytest.mark.parametrize(
    "address",
    [
        "amqp://guest:{}@host/x",
        "nonesuch://{}@host",
        "{}",
        "sqlite://{}@host/x",
        "sqlite:///x.db?{}",
        "sqlite:///x.db?synchronous={}",
        "sqlite:///x.db?key={}&key=2",
        "postgresql://user:{}@host:port/x",
        "postgresql+nonesuch://user:{}@host/x",
        "sqlite:///x.db#{}",
    ],
)
def test_canary(address: str, secret: str) -> None:
    """A password is in no repr and no error, written in the file or brought by a variable."""
    direct = told(f"store = '{address.format(secret)}'\n[transports]\na = '{address.format(secret)}'")
    variable = told(
        f"store = '{address.format('${PW}')}'\n[transports]\na = '${{URL}}'", PW=secret, URL=address.format(secret)
    )
    default = told(f"store = '{address.format('${PW:-' + secret + '}')}'")
    for text in (direct, variable, default):
        assert "c4n4ry" not in text, text
        assert "s3" not in text, text


@given(st.text(), st.sampled_from(["{}", 'store = "{}"', "[routes]\n{}", "[limits]\n{} = 1", '[transports]\nx = "{}"']))
def test_any_text(tmp_path_factory: pytest.TempPathFactory, text: str, around: str) -> None:
    """No text brings anything but a configuration or its own error."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(around.replace("{}", text).encode(errors="replace"))
    found: tuple[str, ...] = ()
    try:
        override(path, None, {}, Limits())
    except ConfigurationError as error:
        found = error.faults
    assert all(fault.startswith(str(path)) for fault in found)


@given(st.sampled_from(["store", "transports.a", "routes.a", "limits.lease"]), st.text("c4n4ry:/@?#=&.%", min_size=1))
def test_any_address(tmp_path_factory: pytest.TempPathFactory, where: str, around: str) -> None:
    """A variable's value is never shown, wherever it stands and whatever it looks like."""
    path = tmp_path_factory.getbasetemp() / "canary.toml"
    path.write_text(f'{where} = "${{SECRET}}"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", f"{around}{CANARY}{around}")
        try:
            shown = repr(read(path))
            override(path, None, {}, Limits())
        except ConfigurationError as error:
            shown = "".join(traceback.format_exception(error))
    assert CANARY not in shown
