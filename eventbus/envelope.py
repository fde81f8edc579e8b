"""What travels: who a message is, where it comes from, its headers and its encoded body."""

import re
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from eventbus.errors import EncodeError
from eventbus.limits import Limits

__all__ = ("CONTROL", "NO_HEADERS", "TEXT", "TRACE", "Envelope", "check_headers", "check_key", "header_fault")

TEXT = 200
"""Characters of an id, name or key: a store's index has to hold them."""

TRACE = ("traceparent", "tracestate")
"""W3C headers that other libraries read, so they travel unescaped."""

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no attribute may hold: control characters and halves of surrogate pairs."""

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_PRINTABLE = re.compile(r"[ -~]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Envelope(NamedTuple):
    """Hold one message as it travels: who it is, where it comes from, and its encoded body.

    >>> from datetime import UTC, datetime
    >>> day = datetime(2030, 1, 2, tzinfo=UTC)
    >>> Envelope(id="1", name="shop.paid", time=day, source="shop", correlation="1", body=b'{"sum":5}').attempt
    1
    """

    id: str
    name: str
    time: datetime
    source: str
    correlation: str
    body: bytes
    causation: str | None = None
    key: str | None = None
    headers: Mapping[str, str] = NO_HEADERS
    version: int = 1
    attempt: int = 1
    due: datetime | None = None
    """Not to be handled before."""
    replyto: str | None = None
    """Where an answer would go; reserved."""


def check_headers(headers: Mapping[str, str], limits: Limits, message: str = "message") -> None:
    """Raise ``EncodeError`` unless every transport can carry the headers of a message unchanged.

    Names are ASCII tokens that differ by more than case, are not ``content-type`` and do not begin with ``ce-``;
    values are any text, but printable ASCII in ``traceparent`` and ``tracestate``.

    Args:
        headers: what the publisher attached.
        limits: what is too much.
        message: the name of the message, for the error.
    """
    if headers and (fault := header_fault(headers, limits)):
        raise EncodeError(message, fault)


def check_key(key: str, message: str = "message") -> None:
    """Raise ``EncodeError`` unless ``key`` can order messages: 1 to ``TEXT`` characters, no control characters."""
    if not 0 < len(key) <= TEXT or (not key.isprintable() and CONTROL.search(key)):
        raise EncodeError(message, f"a key is 1 to {TEXT} characters without control characters, not {key[:50]!r}")


def header_fault(headers: Mapping[Any, Any], limits: Limits) -> str | None:
    """Return what is wrong with the headers of a message, or None."""
    if len(headers) > limits.headers:
        return f"{len(headers)} headers are more than Limits(headers={limits.headers})"
    seen: set[str] = set()
    for name, value in headers.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            return f"a header name is letters, digits and !#$%&'*+-.^_`|~, not {str(name)[:50]!r}"
        lower = name.lower()
        if reason := "it is there twice" if lower in seen else _reserved(lower) or _value_fault(lower, value, limits):
            return f"header {name[:50]!r}: {reason}"
        seen.add(lower)
    return None


def _reserved(name: str) -> str | None:
    return "the name is reserved" if name == "content-type" or name.startswith("ce-") else None


def _value_fault(name: str, value: object, limits: Limits) -> str | None:
    if not isinstance(value, str):
        return "its value is no text"
    if len(name) + len(value) > limits.header:
        return f"longer than Limits(header={limits.header})"
    if name in TRACE and not _PRINTABLE.fullmatch(value):
        return "its value is not printable ASCII"
    return "its value has a lone surrogate" if not value.isascii() and _SURROGATE.search(value) else None
