"""Read JSON that says one thing to every reader, and refuse the rest quickly."""

import json
import math
import re
from itertools import accumulate
from typing import Any

from eventbus.errors import DecodeError

__all__ = ("DIGITS", "check_json", "dump_json", "member", "parse_json")

DIGITS = 4_300
"""Digits of a whole number: Python's own ceiling, whatever this process was told."""

_BLANK = re.compile(r"[ \t\n\r]*")
# An unterminated string matches up to the end, so that no text makes the search start again and again.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NO_BRACKETS = bytes(code for code in range(256) if code not in b"[]{}")
_STEP = tuple(1 if code in b"[{" else -1 for code in range(256))


_FLAT = re.compile(
    rb'\{(?:"[ !#-9;-\[\]-~]*+":(?:"[ !#-\[\]-~]*+"|-?(?:0|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,17}+)?|true|false|null)'
    rb'(?:,(?=")|(?=\})))*+\}'
)
_KEYS = re.compile(rb'[{,]"([^"]*+)":')
"""Where ``_FLAT`` matches, this finds the keys and nothing else: no text in it has a quotation mark, no key a colon."""


def check_json(data: bytes, depth: int) -> None:
    """Raise what ``parse_json`` would; most messages are flat and plain, which costs a look."""
    if _FLAT.fullmatch(data):
        keys = _KEYS.findall(data)
        if len(set(keys)) == len(keys):
            return
    parse_json(data, depth)


def parse_json(data: bytes, depth: int) -> Any:
    """Return the value of a JSON text.

    Raises ``DecodeError``, which quotes nothing of it, for what is no JSON in UTF-8, for nesting beyond ``depth``,
    duplicate keys, NaN and Infinity (1e999 too), lone surrogates and whole numbers of more than 4,300 digits.

    >>> parse_json(b'{"a": [1]}', depth=2)
    {'a': [1]}
    """
    if data.count(b"[") + data.count(b"{") > depth and _nesting(data) > depth:
        raise DecodeError(f"nested more than {depth} levels deep")
    try:
        text = data.decode()
        value = _STRICT.decode(text)
        if "\\ud" in text or "\\uD" in text:
            dump_json(value).encode()
    except json.JSONDecodeError as error:
        raise DecodeError(f"no JSON: {error.msg.rstrip(': ')} (character {error.pos})") from None
    except UnicodeDecodeError as error:
        raise DecodeError(f"no UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise DecodeError("a text with a lone surrogate") from None
    except RecursionError:
        raise DecodeError("nested deeper than this process can read") from None
    return value


def member(data: bytes, name: str) -> bytes:
    """Return the value of one member of an object that ``parse_json`` has read, byte for byte."""
    text = data.decode()
    start = text.index("{") + 1
    while True:
        found, end = _STRICT.raw_decode(text, _skip(text, start))
        start = _skip(text, _skip(text, end) + 1)
        end = _STRICT.raw_decode(text, start)[1]
        if found == name:
            return text[start:end].encode()
        start = _skip(text, end) + 1


def _skip(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    return position if blank is None else blank.end()


def _nesting(data: bytes) -> int:
    brackets = _STRING.sub(b"", data).translate(None, _NO_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise DecodeError("duplicate keys in an object")
    return members


def _whole(digits: str) -> int:
    if len(digits.removeprefix("-")) > DIGITS:
        raise DecodeError(f"a number of more than {DIGITS} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise DecodeError("a number beyond all bounds")
    return value


def _constant(name: str) -> Any:
    raise DecodeError(f"{name} is no JSON")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_whole, parse_float=_finite, parse_constant=_constant
)  # fmt: skip

dump_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Return a value as JSON text, short and not escaped; lone surrogates are left for the encoding to refuse."""
