"""Keep docs/reliability.md honest: every row is there, and every test that it names."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from eventbus.testing.store_exam import CHECKS as STORE
from eventbus.testing.transport_exam import BROKER_CHECKS
from eventbus.testing.transport_exam import CHECKS as TRANSPORT

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"(?m)^\| ([FSB]\d+) \| (.+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "reliability.md").read_text())
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")

ASKED = {
    (f"{check.run.__module__.rpartition('.')[2]}.py", check.run.__name__)
    for check in (*BROKER_CHECKS, *TRANSPORT, *STORE)
}
"""The checks of the exams, by file and function."""


@cache
def defined(file: str) -> frozenset[str]:
    """Return the functions of a file."""
    body = ast.parse((ROOT / "tests" / file).read_text()).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_row_is_there() -> None:
    """The faults, the rules and the bugs of others have their numbers without a gap."""
    numbers = [
        *(f"F{n:02}" for n in range(1, 60)),
        *(f"S{n}" for n in range(1, 21)),
        *(f"B{n:02}" for n in range(1, 26)),
    ]
    assert [row[0] for row in ROWS] == numbers


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_test_exists(row: tuple[str, str, str, str]) -> None:
    """A row names tests that exist, or says why it has none."""
    shown = row[3]
    assert NAMED.sub("", shown).strip() == "" or re.match(r"No test: .+\.", shown)
    for file, name in NAMED.findall(shown):
        assert (file, name) in ASKED or (name.startswith("test_") and name in defined(file)), f"{file} has no {name}"
