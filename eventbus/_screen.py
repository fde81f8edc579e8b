"""Write for people, as aligned text or with rich where it is installed, and for programs, as JSON."""

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from typing import Any, TextIO, cast

from eventbus._extras import load

__all__ = ("age", "as_json", "plain", "progress", "say", "table")

QUIET = 10.0
"""Seconds between two lines of progress where nobody looks at a terminal."""
WIDTH = 30
"""Characters of a bar without rich."""


def plain(text: object) -> str:
    """Return a text in one line that cannot move the cursor, change colours or pretend to be another line.

    >>> len(plain(chr(27)))
    4
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))


def age(seconds: float) -> str:
    """Return a time as people say it.

    >>> age(59.94), age(5000), age(200_000)
    ('59.9 s', '83 min', '56 h')
    """
    return (
        f"{seconds:.1f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36_000
        else f"{seconds / 3600:.0f} h"
    )


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
        return {str(key): one for key, one in cast("Mapping[object, object]", value).items()}
    return str(value)


def _is_rich(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and find_spec("rich") is not None


@contextmanager
def progress(verb: str, total: int) -> Generator[Callable[[int], None]]:
    """Show on standard error how far something is; what it yields is called with how many more are done.

    A bar at a terminal, by rich where it is installed; elsewhere a line now and then.
    """
    if _is_rich(sys.stderr):
        console = load("rich.console:Console")(stderr=True)
        with load("rich.progress:Progress")(console=console, transient=True) as bar:
            task = bar.add_task(verb, total=total)
            yield lambda more: bar.advance(task, more)
        return
    done, told, terminal = 0, time.monotonic(), sys.stderr.isatty()

    def advance(more: int) -> None:
        nonlocal done, told
        done += more
        if terminal:
            full = WIDTH * done // max(total, 1)
            sys.stderr.write(f"\r{verb} [{'#' * full}{'.' * (WIDTH - full)}] {done}/{total}")
        elif time.monotonic() - told >= QUIET:
            told = time.monotonic()
            sys.stderr.write(f"{verb}: {done} of {total}\n")
        sys.stderr.flush()

    try:
        yield advance
    finally:
        if terminal and done:
            sys.stderr.write("\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write rows below the names of their columns."""
    cells = [[plain("" if cell is None else cell) for cell in row] for row in rows]
    if _is_rich(sys.stdout):
        console = load("rich.console:Console")()
        taken = sum(2 + max(len(row[place]) for row in [columns, *cells]) for place in range(len(columns) - 1))
        room = max(20, console.width - taken)  # what stands last is cut, so that a row is a line
        cells = [[*row[:-1], row[-1] if len(row[-1]) <= room else f"{row[-1][: room - 1]}…"] for row in cells]
        made = load("rich.table:Table")(*columns, box=None, pad_edge=False, header_style="bold")
        made.columns[0].no_wrap = True  # it is there to be copied
        for column in made.columns:
            column.overflow = "fold"
        text = load("rich.text:Text")
        for row in cells:
            made.add_row(*map(text, row))
        console.print(made)
        return
    widths = [max(len(row[place]) for row in [columns, *cells]) for place in range(len(columns))]
    for row in [list(columns), *cells]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
