"""Read the wiring of a deployment from a TOML file: what stands there beats what the code says."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from eventbus import store as stores
from eventbus import transport as carriers
from eventbus.errors import ConfigurationError, MissingExtraError
from eventbus.limits import Limits
from eventbus.routes import RESERVED, meant
from eventbus.store import Store
from eventbus.transport import Transport

__all__ = ("Configuration", "Overridden", "Text", "masked", "override", "read")

SECTIONS = ("store", "transports", "routes", "limits")
LARGEST = 1_048_576
"""Bytes of a configuration file."""
VARIABLE = re.compile(r"\$?\$\{([^}]*)(\}?)")
NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
ADDRESS = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)([^@/?#]*@)?([\w.${}-]*(?::(?:\d+|\$\{\w+\}))?(?:/[\w./ ${}-]*)?)(\?[^@]*)?"
)
SHORT = 4
"""Letters below which a secret cannot be taken out of a sentence without taking the sentence apart."""

Keys = tuple[str, ...]
Overridden = tuple[Store | str | None, Mapping[str, Transport | str], Limits, Mapping[str, Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Text:
    """Hold a text of the file, as it was written and with its variables; only the first is ever shown, masked."""

    written: str
    value: str = field(repr=False)
    given: tuple[str, ...] = field(default=(), repr=False)
    """What the variables brought."""

    def __repr__(self) -> str:
        return repr(masked(self.written))


@dataclass(frozen=True, slots=True)
class Configuration:
    """Hold what one file says; its ``repr`` shows no password and no variable's value."""

    path: str
    store: Text | None
    transports: Mapping[str, Text]
    routes: Mapping[str, tuple[Text, ...]]
    limits: Mapping[str, Any]
    lines: Mapping[Keys, int] = field(repr=False)


def masked(address: str) -> str:
    """Return an address with everything hidden that may be secret: who calls, the options, and what is no address.

    >>> masked("amqp://guest:secret@localhost/shop?key=secret")
    'amqp://***@localhost/shop?***'
    """
    address = VARIABLE.sub(lambda found: f"${{{found[1].partition(':')[0]}}}", address)
    if VARIABLE.fullmatch(address):
        return address
    found = ADDRESS.fullmatch(address)
    if found is None:
        scheme, there, _ = address.partition("://")
        return f"{scheme}://***" if there and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) else "***"
    scheme, user, place, options = found.groups()
    return f"{scheme}{'***@' * bool(user)}{place}{'?***' * bool(options)}"


def read(path: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> Configuration:
    """Return what a configuration file says, its variables filled in.

    Args:
        path: the TOML file.
        environment: name -> value of variables; default: this process's.

    Raises one ``ConfigurationError`` that lists every fault with its line.
    """
    return _Reader(os.fspath(path), os.environ if environment is None else environment).read()


def override(
    path: str | os.PathLike[str], store: Store | str | None, transports: Mapping[str, Transport | str], limits: Limits
) -> Overridden:
    """Return the store, transports, limits and rules of a bus, what the file says instead of what the code does.

    Args:
        path: the TOML file.
        store, transports, limits: as the code gave them.

    Raises ``ConfigurationError``, and ``MissingExtraError`` for an address whose library is not installed.
    """
    found = read(path)
    faults = _Faults(found.path, found.lines)
    for name, number in found.limits.items():
        try:
            limits = replace(limits, **{name: number})
        except ValueError as error:
            faults.add(("limits", name), str(error))
    known = {*RESERVED, *transports, *found.transports}
    for key, targets in found.routes.items():
        for target in targets:
            if target.value not in known:
                named = repr(target.value) if target.value == target.written else repr(target)
                hint = meant(target.value, known)
                faults.add(("routes", key), f"{named} is no transport of this bus{hint}")
    faults.check()
    made: dict[str, Transport | str] = {**transports}
    if found.store is not None:
        store = _connected(stores, found.store, ("store",), limits, faults)
    for name, address in found.transports.items():
        made[name] = _connected(carriers, address, ("transports", name), limits, faults)
    faults.check()
    return store, made, limits, {key: [one.value for one in targets] for key, targets in found.routes.items()}


class _Faults:
    def __init__(self, path: str, lines: Mapping[Keys, int]) -> None:
        self._path = path
        self._lines = lines
        self._found: list[tuple[int, str]] = []

    def add(self, keys: Keys, sentence: str) -> None:
        line = next((self._lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in self._lines), 1)
        self._found.append((line, f"{self._path}:{line}: {'.'.join(keys)}: {sentence}"))

    def check(self) -> None:
        """Raise what was found."""
        if self._found:
            raise ConfigurationError([sentence for _, sentence in sorted(self._found)]) from None


class _Reader:
    def __init__(self, path: str, environment: Mapping[str, str]) -> None:
        self._path = path
        self._environment = environment
        self._faults = _Faults(path, {})

    def read(self) -> Configuration:
        data, lines = self._parsed()
        self._faults = _Faults(self._path, lines)
        for key in data:
            if key not in SECTIONS:
                self._faults.add((key,), f"is no part of a configuration{meant(key, SECTIONS)}")
        store = self._address(("store",), data["store"]) if "store" in data else None
        transports = {
            name: text
            for name, value in self._table(data, "transports").items()
            if (text := self._address(("transports", name), value)) is not None
        }
        for name in sorted(set(transports) & set(RESERVED)):
            self._faults.add(("transports", name), "is built in; call yours another name")
        routes = {key: self._targets(key, value) for key, value in self._table(data, "routes").items()}
        limits = {
            name: number
            for name, value in self._table(data, "limits").items()
            if (number := self._number(name, value)) is not None
        }
        self._faults.check()
        return Configuration(self._path, store, transports, routes, limits, lines)

    def _parsed(self) -> tuple[dict[str, Any], dict[Keys, int]]:
        try:
            with Path(self._path).open("rb") as file:
                raw = file.read(LARGEST + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "that is no path"
            hint = " (relative to the working directory)" if not Path(self._path).is_absolute() else ""
            raise ConfigurationError([f"{self._path}: cannot be read{hint}: {reason}"]) from None
        if len(raw) > LARGEST:
            raise ConfigurationError([f"{self._path}: is larger than {LARGEST} bytes, so it is no configuration"])
        text = ""
        try:
            text = raw.decode().replace("\r\n", "\n")
            return tomllib.loads(text), _lines(text)
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            sentence = f"{self._path}:{line}: is not UTF-8"
        except tomllib.TOMLDecodeError as error:
            line = _broken(str(error), text)
            sentence = f"{self._path}:{line}: is not TOML: {_told(str(error))}"
        except (ValueError, RecursionError):
            sentence = f"{self._path}:1: holds a number or a nesting that cannot be read"
        raise ConfigurationError([sentence])

    def _table(self, data: Mapping[str, Any], section: str) -> dict[str, Any]:
        value = data.get(section, {})
        if isinstance(value, dict):
            return cast("dict[str, Any]", value)
        self._faults.add((section,), f"is a table: write [{section}] and its lines below")
        return {}

    def _text(self, keys: Keys, written: str) -> Text | None:
        """Return a text with its variables filled in, or None after saying what is wrong."""
        given: list[str] = []
        faults: list[str] = []

        def fill(found: re.Match[str]) -> str:
            if found[0].startswith("$$"):
                return found[0][1:]
            variable = NAMED.fullmatch(found[1]) if found[2] else None
            if variable is None:
                faults.append("a variable is written ${NAME} or ${NAME:-default}, and a plain ${ as $${")
                return ""
            name, default = variable.groups()
            value = self._environment.get(name)
            if value is None and default is None:
                close = get_close_matches(name, sorted(self._environment), n=1, cutoff=0.8)
                hint = f", did you mean {close[0]}?" if close else ""
                faults.append(f"the variable {name} is not set{hint}: set it, or write ${{{name}:-default}}")
            filled = (value or default or "") if default is not None else value or ""
            given.append(filled)
            return filled

        value = VARIABLE.sub(fill, written)
        for fault in faults:
            self._faults.add(keys, fault)
        return None if faults else Text(written, value, tuple(filter(None, given)))

    def _address(self, keys: Keys, value: object) -> Text | None:
        if not isinstance(value, str):
            self._faults.add(keys, 'takes an address in quotes, such as "sqlite:///shop.db"')
            return None
        text = self._text(keys, value)
        if text is not None and not text.value:
            self._faults.add(keys, "is empty: leave it out to keep what the code says")
            return None
        return text

    def _targets(self, key: str, value: object) -> tuple[Text, ...]:
        keys = ("routes", key)
        if isinstance(value, dict):
            inner = next(iter(cast("dict[str, object]", value)), "")
            self._faults.add(keys, f'a name with dots stands in quotes: "{key}.{inner}" = ...')
            return ()
        given = cast("list[object]", value) if isinstance(value, list) else [value]
        if not given or not all(isinstance(one, str) for one in given):
            self._faults.add(
                keys, 'takes the name of a transport or a list of them, such as "store" or ["store", "events"]'
            )
            return ()
        found = [text for one in given if (text := self._text(keys, cast("str", one))) is not None]
        if any("://" in text.value for text in found):
            self._faults.add(keys, "takes the name of a transport: an address stands under [transports]")
        return tuple(found)

    def _number(self, name: str, value: object) -> float | None:
        keys = ("limits", name)
        known = {one.name: one for one in fields(Limits)}
        if name not in known:
            self._faults.add(keys, f"is no limit{meant(name, known)}")
            return None
        if isinstance(value, str) and "${" in value:
            text = self._text(keys, value)
            if text is None:
                return None
            try:
                return int(text.value) if known[name].type in ("int", int) else float(text.value)
            except ValueError:
                self._faults.add(keys, f"{text!r} does not hold a number")
                return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._faults.add(keys, "takes a number without quotes")
            return None
        return value


def _lines(text: str) -> dict[Keys, int]:
    """Return where each key stands: at the first line after which a part of the file reads and knows it."""
    lines: dict[Keys, int] = {}
    all_lines = text.split("\n")
    start = 0
    for end in range(1, len(all_lines) + 1):
        data = _whole("\n".join(all_lines[:end]))
        if data is not None:
            for keys in _keys(data):
                lines.setdefault(keys, start + 1)
            start = end
    return lines


def _whole(part: str) -> dict[str, Any] | None:
    """Return what a part of a file says, or None if it ends within a value."""
    try:
        return tomllib.loads(part)
    except tomllib.TOMLDecodeError:
        return None


def _keys(data: Mapping[str, Any]) -> list[Keys]:
    found: list[Keys] = []
    for key, value in data.items():
        found.append((key,))
        if isinstance(value, dict):
            found.extend((key, inner) for inner in cast("dict[str, Any]", value))
    return found


def _told(error: str) -> str:
    """Return the words of a parser's error without anything that it quotes from the file."""
    found = re.match(r"[A-Za-z][A-Za-z /-]*", error.partition(" (at ")[0])
    return found[0].strip().lower() if found else "it cannot be parsed"


def _broken(error: str, text: str) -> int:
    found = re.search(r"\(at line (\d+)", error)
    return int(found[1]) if found else text.rstrip("\n").count("\n") + 1


def _connected(port: Any, address: Text, keys: Keys, limits: Limits, faults: _Faults) -> Any:
    """Return what an address names, or None after saying what is wrong, without what may be secret in it."""
    scheme, there, _ = address.value.partition("://")
    known = {*port.SCHEMES, *(point.name for point in entry_points(group=port.GROUP))}
    if not there or not {scheme, scheme.partition("+")[0]} & known:
        hint = meant(scheme, known) if there and masked(address.written) != "***" else meant("", known)
        faults.add(keys, f"{address!r} is no address that anybody here offers{hint}")
        return None
    try:
        return port.connect(address.value, limits)
    except MissingExtraError:
        raise
    except Exception as error:
        faults.add(keys, f"{address!r} was refused: {_scrubbed(str(error), address)}")
        return None


def _scrubbed(sentence: str, address: Text) -> str:
    """Return a sentence without the secrets of an address; nothing of it if they are too short to be told apart."""
    rest = address.value.partition("://")[2]
    user, _, place = rest.rpartition("@")
    options = [one.partition("=") for one in place.partition("?")[2].split("&")]
    values = (value or ("" if equals else name) for name, equals, value in options)
    raw = {address.value, rest, user, *user.split(":"), *values, *address.given}
    secrets = {one for text in raw for one in (text, unquote(text)) if one}
    for secret in sorted(secrets, key=len, reverse=True):
        if secret in sentence:
            if len(secret) < SHORT:
                return "it cannot be understood"
            sentence = sentence.replace(secret, "***")
    return sentence
