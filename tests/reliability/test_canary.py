"""What lets us in is shown nowhere: a canary in every form of every URL, and everything that anybody could read.

Refuses: celery/celery#6763 and celery/celery#9997, a broker's password in the banner and in the logs (S7, B13).
"""

import io
import logging
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import anyio
import pytest

from eventbus import Event, EventBus, Module, Retry, cli, store, transport

CANARY = "c4n4ry"
SHARP = "c4n4ry/s3@cret"
AWAY = "127.0.0.1:1"

FORMS = {
    "password": f"//user:{CANARY}@{AWAY}",
    "password and path": f"//user:{CANARY}@{AWAY}/0",
    "password alone": f"//:{CANARY}@{AWAY}",
    "percent-encoded": f"//user:{quote(SHARP, safe='')}@{AWAY}",
    "all encoded": f"//user:{''.join(f'%{ord(one):02x}' for one in CANARY)}@{AWAY}",
    "not encoded": f"//user:{SHARP}@{AWAY}",
    "number and slash": f"//user:1234/{CANARY}@{AWAY}",
    "with hash": f"//user:a#{CANARY}@{AWAY}",
    "with question mark": f"//user:a?{CANARY}@{AWAY}",
    "with at sign": f"//user:a@{CANARY}@{AWAY}",
    "with comma": f"//user:a,{CANARY}@{AWAY}",
    "with blank": f"//user:{CANARY} x@{AWAY}",
    "with percent": f"//user:%{CANARY}@{AWAY}",
    "with brackets": f"//user:[{CANARY}]@{AWAY}",
    "with half a bracket": f"//user:{CANARY}]@{AWAY}",
    "with an odd letter": f"//user:{CANARY}\u2100@{AWAY}",
    "without host": f"//user:{CANARY}",
    "as port": f"//user@host:{CANARY}",
    "token": f"//{CANARY}@{AWAY}",
    "parameter": f"//{AWAY}/?password={CANARY}",
    "bare parameter": f"//{AWAY}/?{CANARY}",
    "passphrase of TLS": f"//{AWAY}/0?sslpassword={CANARY}",
    "key of TLS": f"//{AWAY}/?ssl_keyfile_password={CANARY}&sslmode=disable",
    "twice": f"//{AWAY}/?timeout={CANARY}&timeout=1",
    "wrong option": f"//{AWAY}/?timeout={CANARY}",
    "wrong switch": f"//{AWAY}/?declare={CANARY}&create={CANARY}",
    "wrong number": f"//{AWAY}/?max_bytes={CANARY}",
    "fragment": f"//{AWAY}/#{CANARY}",
    "no slashes": f"user:{CANARY}@{AWAY}",
    "two hosts": f"//user:a@{AWAY},user:{CANARY}@{AWAY}",
}
STORES = (
    *("memory", "sqlite", "sqlite+aiosqlite", "postgresql", "postgresql+psycopg", "postgresql+asyncpg"),
    *("mariadb", "mysql+asyncmy", "nonesuch"),
)
TRANSPORTS = (*transport.SCHEMES, "nonesuch")
NAMED = ("postgresql", "mariadb", "mysql", "sqlite+", "amqp")
NO_SECRET = ("token", "fragment")
"""What is a name in such an address, and may be shown: that of the user, or of the database."""


LIVE = ("password", "percent-encoded", "token", "parameter", "passphrase of TLS", "key of TLS")
"""The forms with which a bus is started, too."""


class Paid(Event, name="shop.paid"):
    order: int


class Sent(Event, name="shop.sent"):
    order: int


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """The client libraries run on asyncio."""
    return "asyncio"


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """Return what is logged by anybody, at every level, with the tracebacks."""
    text, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(text), root.level
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s %(args)r"))
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.setLevel(level)
    root.removeHandler(handler)


def told(error: BaseException | None) -> str:
    """Return everything that is in an error and in what led to it."""
    texts, waiting, seen = list[str](), [error], set[int]()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        texts += [str(one), repr(one), repr(getattr(one, "__notes__", ())), *traceback.format_exception(one)]
        waiting += [one.__cause__, None if one.__suppress_context__ else one.__context__]
        waiting += getattr(one, "exceptions", ())
    return "\n".join(texts)


def shop(thing: object, url: str, place: str) -> EventBus:
    """Return a bus with the store or the transport of a URL, and a handler that dies of opening it."""
    module = Module("shop", messages=[Paid, Sent])

    @module.on(Paid, retry=Retry(1))
    async def fail(event: Paid) -> None:
        async with thing.__class__.from_url(url):  # type: ignore[attr-defined]
            raise RuntimeError("opened")

    if place == "store":
        return EventBus(module, name="shop", store=url, routes={Paid: "memory"})
    return EventBus(module, name="shop", transports={"events": url}, routes={Paid: "memory", Sent: "events"})


def commanded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bus: EventBus, place: str) -> str:
    """Return what the command line says of a bus."""
    monkeypatch.setitem(sys.modules, "canary_app", SimpleNamespace(bus=bus))  # type: ignore[arg-type]
    asked = [["topology"], ["topology", "--json"], ["explain", "shop.paid"], ["check", "--offline"]]
    asked += [["health"]] if place == "store" else []
    for words in asked:
        with pytest.raises(SystemExit):
            cli.main([*words, "canary_app:bus"])
    said = capsys.readouterr()
    return said.out + said.err


async def lived(bus: EventBus) -> str:
    """Return what a bus shows while it runs and cannot reach what it needs."""
    try:
        async with bus.running():
            await bus.publish(Paid(order=1), atomic=False)
        async with bus.running():
            (dead,) = await bus.dead.find()
            return f"{dead!r} {dead} {bus.health()!r} {bus.health().as_dict()}"
    except Exception as error:
        return told(error)


def forms() -> Iterator[object]:
    for place, schemes in (("store", STORES), ("transport", TRANSPORTS)):
        for scheme in schemes:
            for form, rest in FORMS.items():
                if form not in NO_SECRET or not scheme.startswith(NAMED):
                    yield pytest.param(place, f"{scheme}:{rest}", form in LIVE, id=f"{place} {scheme} {form}")


@pytest.mark.parametrize(("place", "url", "live"), [*forms()])
def test_no_form_of_a_secret_is_shown(
    place: str,
    url: str,
    live: bool,
    logged: io.StringIO,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: object,
) -> None:
    """Neither logs, errors, repr, explain, topology, health, the dead nor the command line show what is secret."""
    monkeypatch.chdir(str(tmp_path))
    port = store if place == "store" else transport
    try:
        thing = port.connect(url)
        bus = shop(thing, url, place)
        seen = [repr(thing), str(thing), repr(bus), repr(bus.wiring), str(bus.explain()), repr(asdict(bus.explain()))]
        if live:
            seen.append(commanded(capsys, monkeypatch, bus, place))
            seen.append(anyio.run(lived, bus))
    except Exception as error:
        seen = [told(error)]
    text = "\n".join([*seen, logged.getvalue()])
    for secret in (CANARY, "s3", quote(CANARY[1:]), FORMS["all encoded"][7:20]):
        assert secret not in text, text[max(0, text.index(secret) - 300) : text.index(secret) + 100]


@pytest.mark.parametrize(
    ("server", "scheme", "user"),
    [
        *(("valkey", scheme, "default") for scheme in ("redis", "redis+pubsub")),
        *(("valkey", scheme, "nobody") for scheme in ("redis", "redis+pubsub")),
        *(("nats", scheme, "user") for scheme in ("nats", "nats+core")),
        *(("postgres", scheme, "postgres") for scheme in ("postgresql+psycopg", "postgresql+asyncpg")),
        *(("postgres", scheme, "nobody") for scheme in ("postgresql+psycopg", "postgresql+asyncpg")),
        *(("postgres", "postgresql+notify", user) for user in ("postgres", "nobody")),
    ],
)
def test_nor_where_it_is_used(
    server: str, scheme: str, user: str, request: pytest.FixtureRequest, logged: io.StringIO
) -> None:
    """Neither do the client libraries log it, at any level, when it lets us in or is refused."""
    parts = urlsplit(request.getfixturevalue(server).url)
    place = "transport" if scheme in transport.SCHEMES else "store"
    tail = "?create=true" if place == "store" else ""
    url = f"{scheme}://{user}:{CANARY}@127.0.0.1:{parts.port}{parts.path}{tail}"
    bus = shop((store if place == "store" else transport).connect(url), url, place)
    seen = anyio.run(lived, bus) + logged.getvalue()
    assert CANARY not in seen, seen[max(0, seen.index(CANARY) - 300) : seen.index(CANARY) + 100]
    assert "DeadEntry" in seen or user == "nobody"
