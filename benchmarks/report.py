"""Show what was measured: as a table, as JSON, and on a page of the documentation."""

import json
import os
import platform
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measure import Goal, Row, Sample

__all__ = ("HEAD", "Facts", "against_goals", "cells", "dump", "facts", "load", "markdown", "text", "write_page")

HEAD = ("what", "ours", "baseline", "takes", "ratio (min)", "ratio (median)", "goal", "reached")
Results = Mapping[str, Sequence[Row]]
"""Benchmark -> its comparisons."""
Facts = Mapping[str, str]
"""What the numbers depend on."""


def facts(packages: Iterable[str] = ("anyio", "fastapi", "pydantic", "sqlalchemy", "psycopg")) -> Facts:
    """Return what the numbers depend on."""
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "sqlite": sqlite3.sqlite_version,
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def cells(row: Row) -> tuple[str, ...]:
    """Return one comparison in words."""
    ratio = row.ratio
    reached = "" if row.goal is None else "yes" if row.goal.reached(ratio.best) else "no"
    return (
        row.what,
        _amount(row.ours, row.unit),
        row.baseline,
        _amount(row.floor, row.unit),
        f"{ratio.best:.2f}",
        f"{ratio.median:.2f}",
        "" if row.goal is None else str(row.goal),
        reached,
    )


def against_goals(results: Results) -> list[tuple[str, ...]]:
    """Return all that has a goal in one table: the goal, the best peer, ours."""
    lines = [("part", "goal", "what", "ours", "ratio to", "best peer", "reached")]
    for name, rows in results.items():
        for row in rows:
            if row.goal is not None:
                ratio = row.ratio.best
                reached = "yes" if row.goal.reached(ratio) else "no"
                peer = row.goal.peer
                lines.append((name, str(row.goal), row.what, f"{ratio:.2f}", row.baseline, peer, reached))
    return lines


def _amount(sample: Sample, unit: str) -> str:
    value = sample.best
    if unit == "B":
        return f"{value:,.0f} B"
    if unit == "/s":
        return f"{1 / value:,.0f}/s"
    for limit, factor, name in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * factor:,.3g} {name}"
    return f"{value:,.2f} s"


def text(table: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table for a page."""
    head, *lines = table
    rule = ["---" if index in (0, 2) else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def dump(path: Path, known: Facts, results: Results) -> None:
    """Write results as JSON."""
    content = {"facts": dict(known), "results": {name: [asdict(row) for row in rows] for name, rows in results.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{json.dumps(content, indent=1)}\n")


def load(path: Path) -> tuple[Facts, dict[str, list[Row]]]:
    """Read what ``dump`` wrote."""
    content = json.loads(path.read_text())
    return content["facts"], {name: [_row(**row) for row in rows] for name, rows in content["results"].items()}


def _row(ours: Any, floor: Any, goal: Any, **others: Any) -> Row:
    return Row(ours=Sample(**ours), floor=Sample(**floor), goal=None if goal is None else Goal(**goal), **others)


def write_page(page: Path, tables: Mapping[str, str]) -> list[str]:
    """Put each table between its two markers; return the names that the page has no markers for."""
    content, missing = page.read_text(), list[str]()
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = content.partition(begin)
        _, closed, after = rest.partition(end)
        if found and closed:
            content = f"{before}{begin}\n{table}\n\n{end}{after}"
        else:
            missing.append(name)
    page.write_text(content)
    return missing
