"""Read a NATS URL, and name streams, consumers and subjects."""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from eventbus._urls import options_of, split_url

__all__ = ("Address", "consumer_of", "dead_stream_of", "dead_subject_of", "safe_name", "stream_of", "subject_of")

LONGEST = 180
"""Characters of a stream's or a consumer's name; the server keeps them as names of directories."""
PORT = 4222
SUBJECT = re.compile(r"[^\s.*>$]+(\.[^\s.*>]+)*")

Text = str | None
SWITCHES = {"true": True, "false": False}

LINK = ("tls", "tls_ca", "tls_cert", "tls_key", "tls_first", "credentials", "nkey", "name")
"""The options of every connection."""
TOPOLOGY = ("declare", "replicas", "max_age", "max_bytes", "domain")
"""The options of JetStream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Say where a NATS server is, how to be let in, and what to create there; ``repr`` shows no secret."""

    servers: tuple[str, ...]
    user: Text = field(default=None, repr=False)
    password: Text = field(default=None, repr=False)
    token: Text = field(default=None, repr=False)
    credentials: Text = None
    nkey: Text = None
    name: Text = None
    tls: bool = False
    tls_ca: Text = None
    tls_cert: Text = None
    tls_key: Text = None
    tls_first: bool = False
    declare: bool = True
    replicas: int = 1
    max_age: float = 0.0
    max_bytes: int = -1
    domain: Text = None

    @classmethod
    def parse(cls, url: str, known: tuple[str, ...]) -> "Address":
        """Return the address in ``nats://user:password@host:4222,other:4222?option=value``.

        Raises ``ValueError`` that names the known options, and never shows the part before the ``@``.
        """
        parts = split_url(url)
        secret, _, hosts = parts.netloc.rpartition("@")
        where = f"{parts.scheme}://"
        if parts.path not in ("", "/") or parts.fragment:
            raise ValueError(f"{where} takes hosts and options, no path and no fragment")
        options = options_of(parts, known)
        user, colon, password = secret.partition(":")
        return cls(
            servers=tuple(_server(host, where) for host in (hosts or "localhost").split(",")),
            user=unquote(user) if colon else None,
            password=unquote(password) if colon else None,
            token=unquote(user) if user and not colon else None,
            **_values(options, where),
        )

    def __str__(self) -> str:
        return ",".join(self.servers)

    @property
    def encrypted(self) -> bool:
        """Tell whether nothing may go over the wire without TLS."""
        return self.tls or self.tls_first

    def context(self) -> ssl.SSLContext | None:
        """Return what TLS needs, or None where it is not wanted."""
        if not self.encrypted:
            return None
        context = ssl.create_default_context(cafile=self.tls_ca)
        if self.tls_cert is not None:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        return context


def _server(text: str, where: str) -> str:
    try:
        parts = split_url(f"nats://{text}")
        host, port = parts.hostname, parts.port or PORT
    except ValueError:
        host, port = None, 0
    if not host or not port:
        raise ValueError(f"{where} names a host that cannot be read; a user and a password are percent-encoded")
    return f"nats://{f'[{host}]' if ':' in host else host}:{port}"


def _values(options: Mapping[str, str], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in options.items():
        try:
            if name in ("tls", "tls_first", "declare"):
                values[name] = SWITCHES[text]
            elif name in ("replicas", "max_bytes"):
                values[name] = _above_zero(int(text))
            elif name == "max_age":
                values[name] = _above_zero(float(text))
            else:
                values[name] = _not_empty(text)
        except (KeyError, ValueError):
            raise ValueError(f"{where}...?{name}= cannot take this value") from None
    return values


def _above_zero(number: float) -> float:
    if not 0 < number < float("inf"):
        raise ValueError(number)
    return number


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


def safe_name(text: str) -> str:
    """Return a text as a name that the server takes: itself if it may be one, else altered and with its hash.

    >>> safe_name("orders"), safe_name("shop.orders")
    ('orders', 'shop_orders-7458f44c')
    """
    if re.fullmatch(f"[A-Za-z0-9_-]{{1,{LONGEST}}}", text):
        return text
    altered = re.sub("[^A-Za-z0-9_-]", "_", text)[: LONGEST - 9]
    return f"{altered}-{sha256(text.encode()).hexdigest()[:8]}"


def subject_of(topic: str) -> str:
    """Return the subject of a topic: its name, if a subject may be called so."""
    return topic if SUBJECT.fullmatch(topic) and len(topic) <= LONGEST else safe_name(topic)


def stream_of(topic: str) -> str:
    """Return the stream that keeps a topic, unless another stream has its subject."""
    return safe_name(topic)


def consumer_of(group: str) -> str:
    """Return the durable consumer of a group."""
    return safe_name(group)


def dead_stream_of(topic: str) -> str:
    """Return the stream that keeps the dead of a topic."""
    return f"dead-{safe_name(topic)}"


def dead_subject_of(topic: str, group: str) -> str:
    """Return the subject of the dead of a group, or of all with ``*``."""
    return f"dead.{safe_name(topic)}.{group if group == '*' else safe_name(group)}"
