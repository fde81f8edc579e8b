"""The AsyncAPI document and the JSON Schemas of a bus, beside ones that were written by hand."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from eventbus import Command, Event, EventBus, Module, message
from eventbus.codec import JSONCodec
from eventbus.documents import asyncapi, schemas

ROOT = Path(__file__).parents[1]
DRAFT = "https://json-schema.org/draft/2020-12/schema"


class Line(BaseModel):
    sku: str
    tags: frozenset[str] = frozenset({"new", "sale", "eco", "last"})


class Place(Command[int], name="shop.place"):
    """Ask for an order."""

    lines: list[Line]


class Placed(Event, name="shop.placed", version=3, key="number"):
    number: int
    first: Line | None = None


@message(name="billing/paid")
@dataclass(frozen=True)
class Paid:
    number: int


@message(name="billing.paid")
@dataclass(frozen=True)
class PaidTwice:
    number: int


@message(name="billing_paid")
@dataclass(frozen=True)
class PaidThrice:
    number: int


class Held:
    """Be what JSON has no word for."""


class Opened(Event, name="shop.opened"):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    held: Held


def made() -> EventBus:
    """Return a bus with messages of every kind."""
    shop = Module("shop", messages=[Opened])
    billing = Module("billing", messages=[Paid])

    @shop.handles(Place)
    async def place(cmd: Place) -> int:
        return 1

    @billing.on(Placed)
    async def charge(event: Placed) -> Paid:
        return Paid(1)

    return EventBus(
        billing,
        shop,
        name="shop",
        store="memory://",
        transports={"events": "redis://127.0.0.1:1"},
        routes={Placed: ["store", "events"]},
    )


LINE = {
    "properties": {
        "sku": {"title": "Sku", "type": "string"},
        "tags": {
            "default": ["eco", "last", "new", "sale"],
            "items": {"type": "string"},
            "title": "Tags",
            "type": "array",
            "uniqueItems": True,
        },
    },
    "required": ["sku"],
    "title": "Line",
    "type": "object",
}
NUMBER = {"title": "Number", "type": "integer"}
VERSIONED = {"x-eventbus-version": 3, "x-eventbus-key": "number"}
FAULT = f"it never leaves its process: {JSONCodec().prepare(Opened)}"


def placed(line: str) -> dict[str, Any]:
    return {
        "properties": {"number": NUMBER, "first": {"anyOf": [{"$ref": line}, {"type": "null"}], "default": None}},
        "required": ["number"],
        "title": "Placed",
        "type": "object",
    }


def place(line: str) -> dict[str, Any]:
    return {
        "description": "Ask for an order.",
        "properties": {"lines": {"items": {"$ref": line}, "title": "Lines", "type": "array"}},
        "required": ["lines"],
        "title": "Place",
        "type": "object",
    }


PAID = {"properties": {"number": NUMBER}, "required": ["number"], "title": "Paid", "type": "object"}


def test_schemas() -> None:
    """Each message has a schema that is complete in itself, also one that cannot travel."""
    line = "#/$defs/Line"
    event, command = {"x-eventbus-kind": "event"}, {"x-eventbus-kind": "command"}
    first = {"x-eventbus-version": 1}
    assert schemas(made()) == {
        "billing/paid": {"$schema": DRAFT} | PAID | event | first,
        "shop.opened": {"$schema": DRAFT, "$comment": FAULT} | event | first,
        "shop.place": {"$schema": DRAFT, "$defs": {"Line": LINE}} | place(line) | command | first,
        "shop.placed": {"$schema": DRAFT, "$defs": {"Line": LINE}} | placed(line) | event | VERSIONED,
    }


def channel(key: str, name: str, *route: str) -> dict[str, Any]:
    held = {key: {"$ref": f"#/components/messages/{key}"}}
    return {key: {"address": name, "messages": held, "x-eventbus-route": list(route)}}


def operation(action: str, key: str, *handlers: str) -> dict[str, Any]:
    told = {
        "action": action,
        "channel": {"$ref": f"#/channels/{key}"},
        "messages": [{"$ref": f"#/channels/{key}/messages/{key}"}],
    }
    return {f"{action}.{key}": told | ({"x-eventbus-handlers": list(handlers)} if handlers else {})}


def described(key: str, name: str, kind: str, payload: dict[str, Any] | str, *facts: dict[str, Any]) -> dict[str, Any]:
    title = payload if isinstance(payload, str) else "Opened"
    return {
        key: {
            "name": name,
            "title": title,
            "payload": {"$ref": f"#/components/schemas/{payload}"} if isinstance(payload, str) else payload,
            "traits": [{"$ref": "#/components/messageTraits/cloudevent"}],
            "x-eventbus-kind": kind,
            "x-eventbus-version": 1,
        }
        | dict(*facts)
    }


def test_asyncapi() -> None:
    """The document has a channel and a message for each, and says which of them this application receives and sends."""
    line = "#/components/schemas/Line"
    document = asyncapi(made(), version="2.5")
    (trait,) = document["components"].pop("messageTraits").values()
    assert document == {
        "asyncapi": "3.0.0",
        "info": {"title": "shop", "version": "2.5"},
        "defaultContentType": "application/json",
        "channels": channel("billing_paid", "billing/paid", "inline")
        | channel("shop.opened", "shop.opened", "inline")
        | channel("shop.place", "shop.place", "inline")
        | channel("shop.placed", "shop.placed", "store", "events"),
        "operations": operation("send", "billing_paid")
        | operation("send", "shop.opened")
        | operation("receive", "shop.place", "shop.place")
        | operation("send", "shop.placed")
        | operation("receive", "shop.placed", "billing.charge"),
        "components": {
            "messages": described("billing_paid", "billing/paid", "event", "Paid")
            | described("shop.opened", "shop.opened", "event", {"$comment": FAULT})
            | described("shop.place", "shop.place", "command", "Place")
            | described(
                "shop.placed", "shop.placed", "event", "Placed", {"x-eventbus-version": 3, "x-eventbus-key": "number"}
            ),
            "schemas": {"Line": LINE, "Paid": PAID, "Place": place(line), "Placed": placed(line)},
        },
    }
    assert trait["correlationId"] == {"location": "$message.header#/ce-correlationid"}
    assert trait["headers"]["properties"]["ce-specversion"] == {"const": "1.0"}


def test_names_that_are_written_alike() -> None:
    """Messages whose names AsyncAPI would write alike keep a channel each."""
    bus = EventBus(Module("billing", messages=[PaidThrice, PaidTwice, Paid]))
    addresses = {key: one["address"] for key, one in asyncapi(bus)["channels"].items()}
    assert addresses == {
        "billing.paid": "billing.paid",
        "billing_paid": "billing/paid",
        "billing_paid-2": "billing_paid",
    }


def test_what_is_written_keeps_to_its_schema() -> None:
    """The names in a schema are those on the wire."""
    body = json.loads(JSONCodec().encode(Placed(number=1, first=Line(sku="mug", tags=frozenset({"a"})))))
    schema = schemas(made())["shop.placed"]
    assert set(body) == set(schema["properties"])
    assert set(body["first"]) == set(schema["$defs"]["Line"]["properties"])


def test_same_in_every_process() -> None:
    """Two processes that hash differently print the same documents, byte for byte."""
    code = (
        "import json; from tests.test_documents import *;"
        "print(json.dumps(asyncapi(made())), json.dumps(schemas(made())))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1
