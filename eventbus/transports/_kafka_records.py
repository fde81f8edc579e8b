"""Write wires as Kafka records, and read records as wires.

CloudEvents attributes are headers that begin with ``ce_`` in Kafka and with ``ce-`` in a wire. The id has a header of
its own only where no attribute names it. What other programs wrote is read as far as it can be.
"""

from functools import lru_cache
from typing import Any

from eventbus.transport import Wire

__all__ = ("ID", "REASON", "incoming", "outgoing")

ID = "eventbus-id"
LENIENT = "backslashreplace"
REASON = "eventbus-dead-reason"
"""The header of a dead copy that says why."""


@lru_cache(64)  # few names in a thousand messages
def to_kafka(name: str) -> str:
    """Return what a header of a wire is called in Kafka."""
    return f"ce_{name[3:]}" if name.startswith("ce-") else name


@lru_cache(64)
def from_kafka(name: str) -> str:
    """Return what a header of a record is called in a wire."""
    return f"ce-{name[3:]}" if name.startswith("ce_") else name


def outgoing(wire: Wire) -> dict[str, Any]:
    """Return the arguments with which a producer sends a wire."""
    headers = [(to_kafka(name), value.encode()) for name, value in wire.headers.items()]
    if wire.headers.get("ce-id") != wire.id:
        headers.append((ID, wire.id.encode()))
    return {"value": wire.body, "key": None if wire.key is None else wire.key.encode(), "headers": headers}


def incoming(record: Any) -> Wire:
    """Return the wire of a record that a consumer received."""
    headers = {from_kafka(name): value.decode("utf-8", LENIENT) if value else "" for name, value in record.headers}
    id = headers.pop(ID, None) or headers.get("ce-id") or f"{record.topic}-{record.partition}-{record.offset}"
    key = None if record.key is None else record.key.decode("utf-8", LENIENT)
    return Wire(id, record.value or b"", headers, key)
