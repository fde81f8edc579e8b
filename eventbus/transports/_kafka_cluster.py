"""Say where a Kafka cluster is and how to get in, and translate its names and errors."""

import logging
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from eventbus._extras import require
from eventbus._urls import options_of, split_url
from eventbus.errors import Lost, Refused, TransportError

__all__ = ("Cluster", "Discretion", "aiokafka", "dead_topic", "failure", "group_id", "is_shut", "topic_name")

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
FILES = ("cafile", "certfile", "keyfile")
NUMBERS = ("partitions", "replication", "max_bytes")
OPTIONS = ("sasl", "declare", *FILES, *NUMBERS)
NAME_LENGTH = 249

REFUSALS = ("MessageSizeTooLarge", "InvalidMessage", "CorruptRecord", "RecordListTooLarge", "InvalidTopic", "Policy")
"""How the names of the errors begin with which a broker refuses one message, or one name, for ever."""


class Discretion(logging.Filter):
    """Keep the client from logging what it logs in with, which it does at level DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record may be logged."""
        arguments = record.args if isinstance(record.args, tuple) else ()
        return not any(type(one).__name__.startswith("SaslAuthenticate") for one in arguments)


def aiokafka() -> Any:
    """Return the client library. Raises ``MissingExtraError`` with the install line."""
    for part in ("admin", "conn", "errors", "partitioner", "structs"):
        require(f"aiokafka.{part}", extra="kafka", what="kafka://")
    return require("aiokafka", extra="kafka", what="kafka://")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Hold what a ``kafka://`` URL says; the password is in no representation."""

    servers: tuple[str, ...]
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)
    sasl: str = "PLAIN"
    tls: bool = False
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    partitions: int = 12
    """How many partitions a topic gets that is created here."""
    replication: int = -1
    """How many copies it gets; -1: what the broker prefers."""
    declare: bool = True
    """Create what is missing; otherwise only look whether it is there."""
    max_bytes: int = 983_040
    """The largest body: the broker's maximum for a message, less 64 KiB for headers and key."""

    @classmethod
    def from_url(cls, url: str) -> "Cluster":
        """Return what a URL says. Raises ``ValueError`` for what it does not know, without showing a password."""
        parts = split_url(url)
        login, _, places = parts.netloc.rpartition("@")
        user, _, password = login.partition(":")
        options = options_of(parts, OPTIONS)
        if parts.path not in {"", "/"} or parts.fragment or not all(_is_place(one) for one in places.split(",")):
            raise ValueError("kafka:// takes host:port, more of them with commas, and then only ?options")
        given: dict[str, Any] = {name: options[name] for name in FILES if name in options}
        given |= {name: _whole(name, options[name]) for name in NUMBERS if name in options}
        cluster = cls(
            servers=tuple(one if re.search(r":\d+$", one) else f"{one}:9092" for one in places.split(",")),
            user=unquote(user) or None,
            password=unquote(password),
            sasl=options.get("sasl", "PLAIN").upper(),
            tls=parts.scheme == "kafka+ssl",
            declare=_choice(options, "declare"),
            **given,
        )
        if cluster.sasl not in MECHANISMS:
            raise ValueError(f"kafka://...?sasl= takes {', '.join(MECHANISMS)}")
        if not cluster.tls and {*FILES} & {*options}:
            raise ValueError("cafile, certfile and keyfile are for kafka+ssl://")
        return cluster

    def client(self, timeout: float) -> dict[str, Any]:
        """Return what every client takes; ``timeout`` seconds for one request."""
        context = None
        if self.tls:
            try:
                context = ssl.create_default_context(cafile=self.cafile)
                if self.certfile:
                    context.load_cert_chain(self.certfile, self.keyfile)
            except OSError as error:
                raise TransportError(f"kafka+ssl://: cafile, certfile or keyfile cannot be used: {error}") from error
        login = {}
        if self.user is not None:
            login = {
                "sasl_mechanism": self.sasl,
                "sasl_plain_username": self.user,
                "sasl_plain_password": self.password,
            }
        return {
            "bootstrap_servers": [*self.servers],
            "security_protocol": f"{'SASL_' if login else ''}{'SSL' if self.tls else 'PLAINTEXT'}",
            "ssl_context": context,
            "request_timeout_ms": int(timeout * 1_000),
            **login,
        }


def _is_place(text: str) -> bool:
    return re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?", text) is not None


def _choice(options: Mapping[str, str], name: str) -> bool:
    value = options.get(name, "true")
    if value not in {"true", "false"}:
        raise ValueError(f"kafka://...?{name}= takes true or false")
    return value == "true"


def _whole(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"kafka://...?{name}= takes a whole number from 1")
    return int(value)


def topic_name(text: str) -> str:
    """Return a name as Kafka allows it: unchanged if it is legal, else with a mark that keeps it apart.

    >>> topic_name("shop.order_placed"), topic_name("shop/a")
    ('shop.order_placed', 'shop_a.8585119b')
    """
    legal = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    if legal == text and len(text) <= NAME_LENGTH and text not in {"", ".", ".."}:
        return text
    return f"{legal[: NAME_LENGTH - 9]}.{sha256(text.encode()).hexdigest()[:8]}"


def group_id(topic: str, group: str) -> str:
    """Return what a group of ours is called among the consumer groups of the cluster."""
    return f"{topic}@{group}"


def dead_topic(topic: str, group: str) -> str:
    """Return the topic that keeps the dead of a group."""
    return topic_name(f"{topic}@{group}.dead")


def is_shut(error: BaseException) -> bool:
    """Tell whether an error says that we are not let in."""
    return any(word in type(error).__name__ for word in ("Authentication", "Authorization", "Sasl"))


def failure(error: BaseException, what: str) -> Lost | Refused:
    """Return an error of the client as the port knows it."""
    if isinstance(error, Lost | Refused):
        return error
    name = type(error).__name__
    text = f"{what}: {name}: {error}" if str(error) else f"{what}: {name}"
    return Refused(text) if name.startswith(REFUSALS) else Lost(text)
