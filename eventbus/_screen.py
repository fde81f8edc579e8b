"""Write for people, as aligned text or with rich where it is installed, and for programs, as JSON."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from typing import Any

from eventbus._extras import load

__all__ = ("as_json", "plain", "say", "table")


def plain(text: object) -> str:
    """Return a text in one line that cannot move the cursor, change colours or pretend to be another line.

    >>> len(plain(chr(27)))
    4
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))


def say(text: str) -> None:
    """Write a text to standard output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def as_json(data: object) -> None:
    """Write data as JSON."""
    say(json.dumps(data, indent=2, default=_shown))


def _shown(value: object) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): one for key, one in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write rows below the names of their columns."""
    cells = [[plain("" if cell is None else cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ and find_spec("rich") is not None:
        made = load("rich.table:Table")(*columns, box=None, pad_edge=False, header_style="bold")
        text = load("rich.text:Text")
        for row in cells:
            made.add_row(*map(text, row))
        load("rich.console:Console")().print(made)
        return
    widths = [max(len(row[place]) for row in [columns, *cells]) for place in range(len(columns))]
    for row in [list(columns), *cells]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
