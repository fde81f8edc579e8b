"""Describe the messages of a bus for others: an AsyncAPI 3.0 document, and the JSON Schema of each body."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaValue

from eventbus.bus import EventBus
from eventbus.codec import BodySchema
from eventbus.registry import Registry, Subject

__all__ = ("asyncapi", "schemas")

_TEXT: Mapping[str, Any] = {"type": "string"}
_ENVELOPE: Mapping[str, Any] = {
    "contentType": "application/json",
    "correlationId": {"location": "$message.header#/ce-correlationid"},
    "headers": {
        "type": "object",
        "required": ["ce-specversion", "ce-id", "ce-type", "ce-source", "ce-time"],
        "properties": {
            "ce-specversion": {"const": "1.0"},
            "ce-id": _TEXT,
            "ce-type": _TEXT,
            "ce-source": _TEXT,
            "ce-time": {"type": "string", "format": "date-time"},
            "ce-correlationid": _TEXT,
            "ce-causationid": _TEXT,
            "ce-partitionkey": _TEXT,
            "ce-dataversion": {"type": "string", "pattern": "^[1-9][0-9]*$"},
            "traceparent": _TEXT,
            "tracestate": _TEXT,
        },
    },
}
"""What stands around every body: the binary form of a CloudEvent, as the wire format says it."""


class _Steady(BodySchema):
    """Write the default of a set in the same order in every process."""

    def encode_default(self, dft: Any) -> Any:
        encoded = super().encode_default(dft)
        return sorted(encoded, key=json.dumps) if isinstance(dft, set | frozenset) else encoded


def asyncapi(bus: EventBus, version: str = "1.0.0") -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document of all messages of a bus: a channel for each, whose address is its wire name.

    A message that has a handler here is received; one that has none, that a handler returns, or that its route carries
    further is sent. The same wiring gives the same document.

    Args:
        bus: whose messages; it is compiled, and nothing is opened.
        version: the version of the application, for ``info``.

    Raises ``WiringError``.

    >>> asyncapi(EventBus(name="shop"))["info"]
    {'title': 'shop', 'version': '1.0.0'}
    """
    registry = bus.engine.registry
    subjects = _subjects(registry)
    bodies, definitions = _bodies(registry, subjects)
    returned = {type_ for known in registry.known for type_ in known.returns}
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for key, subject in zip(_keys(subjects), subjects, strict=True):
        name = subject.spec.name
        handlers = sorted({one.handler.name for one in (*subject.inline, *subject.routed)})
        messages[key] = {"name": name, "title": subject.type.__name__} | bodies[name]
        messages[key] |= {"traits": [{"$ref": "#/components/messageTraits/cloudevent"}], **_facts(subject)}
        channels[key] = {
            "address": name,
            "messages": {key: {"$ref": f"#/components/messages/{key}"}},
            "x-eventbus-route": list(subject.route.transports),
        }
        deed = {
            "channel": {"$ref": f"#/channels/{key}"},
            "messages": [{"$ref": f"#/channels/{key}/messages/{key}"}],
        }
        if not handlers or subject.type in returned or len(subject.route.transports) > 1:
            operations[f"send.{key}"] = {"action": "send", **deed}
        if handlers:
            operations[f"receive.{key}"] = {"action": "receive", **deed, "x-eventbus-handlers": handlers}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": bus.name or "eventbus", "version": version},
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": messages,
            "messageTraits": {"cloudevent": dict(_ENVELOPE)},
            "schemas": definitions,
        },
    }


def schemas(bus: EventBus) -> dict[str, dict[str, Any]]:
    """Return wire name -> JSON Schema (draft 2020-12) of the body, for all messages of a bus, each complete in itself.

    Raises ``WiringError``. What ``bus.publish`` writes keeps to its schema.

    >>> from eventbus import Event, Module
    >>> class Paid(Event, name="shop.paid", version=2):
    ...     sum: int
    >>> schemas(EventBus(Module("shop", messages=[Paid])))["shop.paid"]["properties"]
    {'sum': {'title': 'Sum', 'type': 'integer'}}
    """
    registry = bus.engine.registry
    found: dict[str, dict[str, Any]] = {}
    for subject in _subjects(registry):
        fault = registry.wiring.codec.prepare(subject.type)
        body = _comment(fault) if fault else TypeAdapter(subject.type).json_schema(schema_generator=_Steady)
        draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        found[subject.spec.name] = draft | body | _facts(subject)
    return found


def _subjects(registry: Registry) -> list[Subject]:
    return sorted(registry.subjects.values(), key=lambda subject: subject.spec.name)


def _facts(subject: Subject) -> dict[str, Any]:
    kind = {"x-eventbus-kind": "command" if subject.command else "event", "x-eventbus-version": subject.spec.version}
    return kind if subject.spec.key is None else kind | {"x-eventbus-key": subject.spec.key}


def _comment(fault: str) -> JsonSchemaValue:
    return {"$comment": f"it never leaves its process: {fault}"}


def _bodies(registry: Registry, subjects: Sequence[Subject]) -> tuple[dict[str, dict[str, Any]], JsonSchemaValue]:
    """Return wire name -> payload, and the schemas that payloads share."""
    faults = {subject.spec.name: registry.wiring.codec.prepare(subject.type) for subject in subjects}
    able = [
        (subject.spec.name, "validation", TypeAdapter[Any](subject.type))
        for subject in subjects
        if faults[subject.spec.name] is None
    ]
    made, shared = TypeAdapter.json_schemas(
        able,  # type: ignore[arg-type]  # a list is invariant
        schema_generator=_Steady,
        ref_template="#/components/schemas/{model}",
    )
    bodies = {name: {"payload": schema} for (name, _), schema in made.items()}
    bodies |= {name: {"payload": _comment(fault)} for name, fault in faults.items() if fault is not None}
    return bodies, shared.get("$defs", {})


def _keys(subjects: Sequence[Subject]) -> list[str]:
    """Return for each message a name that AsyncAPI takes in its maps; equal ones are numbered."""
    keys: list[str] = []
    for subject in subjects:
        key = plain = re.sub(r"[^A-Za-z0-9._-]", "_", subject.spec.name)
        while key in keys:
            number = int(key.rpartition("-")[2]) + 1 if key != plain else 2
            key = f"{plain}-{number}"
        keys.append(key)
    return keys
