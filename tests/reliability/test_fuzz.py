"""Whatever comes in from outside, nothing but a result or the promised error comes out."""

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eventbus import ConfigurationError, Event, EventBusError, Limits, store, transport
from eventbus.cli import parser
from eventbus.cloudevents import from_binary, from_structured
from eventbus.codec import JSONCodec
from eventbus.config import override
from eventbus.errors import DecodeError

LONG = "9" * 5_000
LIMITS = Limits(body=10_000, header=1_000)
CODEC = JSONCodec(LIMITS)
PIECES = [
    *(
        b"{",
        b"}",
        b",",
        b"[" * 500,
        b'"\\ud800"',
        b"\xff",
        b"\xef\xbb\xbf",
        b"\0",
        b'"',
        b"NaN",
        LONG.encode(),
        b"1e999",
    ),
]
START = b'{"specversion":"1.0","id":"1","type":"shop.paid","source":"s"'
MEMBERS = [
    *(b'"time":"2030-01-02T03:04:05Z"', b'"time":"2030-02-30T23:01:01Z"', b'"time":"9999-12-31T23:59:59-23:59"'),
    *(
        b'"data":{"order":1}',
        b'"data":{"order":1e999}',
        b'"data":{"order":%b}' % LONG.encode(),
        b'"data":[[[',
        b'"id":2',
    ),
    *(b'"attempt":-0', b'"dataversion":1e9', b'"dataversion":true', b'"headers":"{\\"a\\":\\"b\\"}"', b'"headers":"["'),
    *(
        b'"data_base64":"YQ="',
        b'"data_base64":"eyJvcmRlciI6MX0="',
        b'"partitionkey":"\\ud800"',
        b'"dueat":"9"',
        b'"\xff":1',
    ),
]
WIRES = (
    st.binary(max_size=300)
    | st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)
    | st.lists(st.sampled_from(MEMBERS), max_size=6).map(lambda found: b",".join([START, *found]) + b"}")
)
SCHEMES = [*transport.SCHEMES, *store.SCHEMES, "postgresql+psycopg", "sqlite+aiosqlite", "nonesuch", ""]
STARTS = ["://", ":", ":/", ":///", "", "://user:pass@", "://@", "://[", "://]@["]
PORTS = ["", ":5432", ":0", ":65536", ":-1", ":\u0663", f":{LONG}", "/", "/0", f"/{LONG}", "/\u00b2"]
OPTIONS = [
    *("timeout", "trim", "prefix", "cafile", "certfile", "keyfile", "tls", "tls_ca", "replicas", "max_age"),
    *("max_bytes", "partitions", "sasl", "declare", "heartbeat", "exchange", "queue", "dead", "body"),
    *("synchronous", "create", "listen", "connect_timeout", "credentials"),
]
VALUES = ["", "true", "0", "1", "nan", "-inf", "1e400", LONG, "\u0663", "%00", "%ff", "/dev/null", "x"]
FILE = [
    *("store", "=", "[limits]\n", '"${', "}", '"', "\n", "lease", "1e999", "[[", "]]", "routes", '"memory://"', "nan"),
    *("=true", "\0", "{a=1}", "'''", "1979-05-27", LONG),
]
WORDS = [
    *("worker", "check", "explain", "topology", "health", "forget", "ddl", "dead", "list", "show", "replay"),
    *("discard", "--only", "--processes", "--concurrency", "--alive", "--offline", "--json", "--mermaid"),
    *("--lag", "--dialect", "--type", "--handler", "--since", "--error", "--limit", "--dry-run", "-h", "--"),
    *("-", "--x", "--js", "0", "1", "-1", "\u00b2", "\u0663", "1d", "d", "nan", "inf", "0001-01-01", "2026-W01"),
    *("app:bus", "", "5 m", LONG, "9" * 12 + "d", "9" * 30 + "s", "9999-12-31T23:59:59.999999", "a\0b"),
    *("\ud800",),
]


class Paid(Event, name="shop.paid"):
    order: int
    tags: dict[str, list[float | None]] | None = None


@given(
    WIRES,
    st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=6),
)
@settings(max_examples=100)
def test_wire(body: bytes, headers: dict[str, str]) -> None:
    """Bytes and headers are an envelope and then a message, or a ``DecodeError``."""
    named = {"ce-specversion": "1.0", "ce-type": "a", "ce-id": "1", "ce-source": "s", **headers}
    for read in (
        lambda: from_structured(body, LIMITS),
        lambda: from_binary(headers, body, LIMITS),
        lambda: from_binary(named, body, LIMITS, lambda: 0.0),
    ):
        with contextlib.suppress(DecodeError):
            assert isinstance(CODEC.decode(read().body, Paid), Paid)


@given(
    st.builds(
        "{}{}{}{}{}{}".format,
        st.sampled_from(SCHEMES),
        st.sampled_from(STARTS),
        st.text(st.sampled_from("ab.:@/[]%,-1\u2100 \n\0"), max_size=12) | st.text(max_size=12),
        st.sampled_from(PORTS),
        st.sampled_from(["", "?", "?&", "?a", "#", "#a"])
        | st.builds("?{}={}".format, st.sampled_from(OPTIONS), st.sampled_from(VALUES)),
        st.sampled_from(["", "&timeout=1", "#", "\t"]),
    )
)
@example("amqps://h/?cafile=nonesuch.pem")
@example("sqlite:///a%00b")
@example("sqlite:///a%ffb")
@example("redis://h/" + LONG)
@settings(max_examples=80)
@pytest.mark.filterwarnings("ignore:Query string argument")
def test_url(url: str) -> None:
    """A URL is a store, a transport, or a ``ValueError`` or error of our own, in a few words."""
    for port in (store, transport):
        said = ""
        try:
            said = repr(port.connect(url))
        except (ValueError, EventBusError) as error:
            said = str(error)
        assert len(said) < 6_000


@given(
    st.binary(max_size=200) | st.lists(st.sampled_from(FILE), max_size=12).map(lambda parts: "".join(parts).encode())
)
@example(b"[limits]\nlease = nan")
@example(b"[limits]\nbatch = 9223372036854775808")
@example(b"a = " + b"[" * 20_000)
@example(b"a." * 2_000 + b"a = 1")
@settings(max_examples=100)
def test_configuration(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    """The bytes of a configuration are a configuration or a ``ConfigurationError``."""
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz.toml"
    path.write_bytes(text)
    with contextlib.suppress(ConfigurationError):
        override(path, None, {}, Limits())


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=7))
@example(["health", "--lag", "9" * 12 + "d", "app:bus"])
@example(["dead", "list", "--since", "9" * 9 + "d", "app:bus"])
@example(["dead", "list", "--since", "0001-01-01", "app:bus"])
@example(["worker", "--processes", LONG, "app:bus"])
@settings(max_examples=100)
def test_command_line(words: list[str]) -> None:
    """Words are options, or the program ends with 0 after its help and with 2 after saying what is wrong."""
    said, code = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            parser().parse_known_args(words)
        except SystemExit as end:
            code = end.code
    assert code in (None, 0, 2)
    assert (code is None) is (not said.getvalue())
