"""Turn messages into bytes and back."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any, Protocol, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from eventbus._strict_json import DIGITS, check_json, parse_json
from eventbus.errors import DecodeError, EncodeError
from eventbus.limits import Limits
from eventbus.message import spec_of

__all__ = ("BodySchema", "Codec", "JSONCodec")

SHOWN = 5
"""Failing fields that a reason names."""

TRAVELS = "give the field a type that pydantic writes as JSON, or leave it out of the message"

_MASK = b'"**********"'
"""What pydantic writes for a secret, as it does ``null`` for a number that JSON has not; both for good reasons too."""
_REPLACED = "\ufffd".encode()
"""What it writes for half a surrogate pair."""


class BodySchema(GenerateJsonSchema):
    """Make the JSON schema of a body, whatever its defaults are."""

    # Whether there is a schema is the question here, not how well it tells of defaults.
    ignored_warning_kinds = {"non-serializable-default", "skipped-choice", "skipped-discriminator"}  # noqa: RUF012 - pydantic's


class Codec(Protocol):
    """Say what the engine asks of a codec."""

    def prepare(self, type: type) -> str | None:
        """Build what ``type`` needs, once, at start-up; return what is wrong with it, or None."""
        ...

    def encode(self, message: object) -> bytes:
        """Return the body of a message. Raises ``EncodeError``; what it returns, ``decode`` takes."""
        ...

    def decode(self, body: bytes, type: type) -> Any:
        """Return the message of ``type`` in a body. Raises ``DecodeError``, which quotes nothing of the body."""
        ...

    def reread(self, body: bytes, type: type) -> Any:
        """Return the message in a body that ``encode`` wrote in this process. Raises ``DecodeError``."""
        ...


class JSONCodec:
    """Write and read JSON by pydantic, and accept nothing that another reader could understand differently.

    What ``encode`` returns has been read back: a message that would not come back as it was raises ``EncodeError``.

    >>> from eventbus import Event
    >>> class Paid(Event):
    ...     sum: int
    >>> codec = JSONCodec()
    >>> codec.encode(Paid(sum=5))
    b'{"sum":5}'
    >>> codec.decode(b'{"sum":5}', Paid)
    Paid(sum=5)
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._adapters: dict[type, TypeAdapter[Any]] = {}

    def prepare(self, type: type) -> str | None:
        """Build what ``type`` needs, once, at start-up; return what is wrong with it, or None."""
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(type)
            adapter.json_schema(schema_generator=BodySchema, mode="validation")
            adapter.json_schema(schema_generator=BodySchema, mode="serialization")
        except Exception as error:  # Annotations are evaluated and users' hooks run here: anything can come out.
            return f"pydantic builds no JSON schema for {type.__qualname__}: {_first_line(error)}: {TRAVELS}"
        if (twice := _twice(adapter.core_schema)) is not None:
            return f"two fields in {type.__qualname__} are written under one name, {twice!r}: no reader could tell them"
        self._adapters[type] = adapter
        return None

    def encode(self, message: object) -> bytes:
        """Return the body of a message. Raises ``EncodeError``; what it returns, ``decode`` takes."""
        kind = message.__class__
        try:
            adapter = self._adapters.get(kind) or self._built(kind)
            body = _dump(adapter, message)
            fault = self._fault(adapter, message, body)
        except DecodeError as error:
            body, fault = b"", error.reason
        except Exception as error:
            raise EncodeError(
                spec_of(kind).name, f"pydantic cannot write it: {_first_line(error)}: {TRAVELS}"
            ) from error
        if fault is not None:
            raise EncodeError(spec_of(kind).name, fault)
        return body

    def decode(self, body: bytes, type: type) -> Any:
        """Return the message of ``type`` in a body. Raises ``DecodeError``, which quotes nothing of the body."""
        adapter = self._adapters.get(type) or self._built(type)
        check_json(body, self._limits.depth)
        return self._read(adapter, body)

    def reread(self, body: bytes, type: type) -> Any:
        """Return the message in a body that ``encode`` wrote in this process. Raises ``DecodeError``."""
        return self._read(self._adapters.get(type) or self._built(type), body)

    def _built(self, type: type) -> TypeAdapter[Any]:
        if fault := self.prepare(type):
            raise DecodeError(fault)
        return self._adapters[type]

    def _fault(self, adapter: TypeAdapter[Any], message: object, body: bytes) -> str | None:
        if len(body) > self._limits.body:
            return f"its body of {len(body)} bytes is more than Limits(body={self._limits.body})"
        nulls, lost = b"null" in body, _REPLACED in body
        if nulls or lost or b"**********" in body or b"NaN" in body or b"Infinity" in body:
            masks = _MASK in body
            for value in _leaves(adapter.dump_python(message, round_trip=True, warnings=False)):
                if nulls and isinstance(value, float) and not math.isfinite(value):
                    return "a number in it is not finite"
                if masks and hasattr(value, "get_secret_value"):
                    return "a secret in it would be masked: give the field a serializer that reveals it"
                if lost and isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                    return "a text in it has a lone surrogate"
            parse_json(body, self._limits.depth)
        elif len(body) > DIGITS or body.count(b"[") + body.count(b"{") > self._limits.depth:
            parse_json(body, self._limits.depth)
        back = self._read(adapter, body)
        # Equal sets may be written in another order; objects that cannot be compared are written the same.
        same = back == message or _dump(adapter, back) == body
        if same:
            return None
        parse_json(body, self._limits.depth)  # may know a better reason
        return "it would not come back from its JSON as it was"

    def _read(self, adapter: TypeAdapter[Any], body: bytes) -> Any:
        try:
            return adapter.validator.validate_json(body)
        except ValidationError as error:
            raise DecodeError(_reason(error)) from None
        except MemoryError:
            raise
        except Exception as error:
            raise DecodeError(f"a validator raised {error.__class__.__name__}") from error


def _dump(adapter: TypeAdapter[Any], message: object) -> bytes:
    # Types that differ from their annotations are no warning here: reading back decides.
    return adapter.serializer.to_json(message, by_alias=True, round_trip=True, warnings=False)


def _twice(schema: object) -> str | None:
    """Return a name under which two fields of one object are written, or None."""
    waiting, seen = [schema], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or not isinstance(part, dict | list):
            continue
        seen.add(id(cast("object", part)))
        if isinstance(part, list):
            waiting.extend(cast("list[object]", part))
            continue
        node = cast("dict[str, Any]", part)
        if node.get("type") in ("model-fields", "dataclass-args", "typed-dict"):
            fields = cast("dict[str, dict[str, Any]] | list[dict[str, Any]]", node["fields"])
            named = fields.items() if isinstance(fields, dict) else [(field["name"], field) for field in fields]
            names = Counter[str](field.get("serialization_alias") or name for name, field in named)
            most = names.most_common(1)
            if most and most[0][1] > 1:
                return most[0][0]
        waiting.extend(value for name, value in node.items() if name not in ("metadata", "default"))
    return None


def _first_line(error: Exception) -> str:
    return f"{error.__class__.__name__}: {str(error).partition(chr(10))[0][:200]}"


def _leaves(value: object) -> Iterator[object]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(chain.from_iterable(cast("Mapping[object, object]", value).items()))
        elif isinstance(value, Collection) and not isinstance(value, (str, bytes)):
            waiting.extend(cast("Collection[object]", value))
        else:
            yield value


def _reason(error: ValidationError) -> str:
    # Messages of pydantic may quote the input, kinds of error never do.
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    named = [f"{'.'.join(_field(part) for part in each['loc']) or 'body'} ({each['type']})" for each in errors[:SHOWN]]
    more = f" and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return f"{error.title} does not accept {', '.join(named)}{more}"


def _field(part: object) -> str:
    # A key of a dict in the body can be anything.
    return "".join(character if character.isprintable() else "?" for character in str(part)[:50])
