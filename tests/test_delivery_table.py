"""Keep what the pages promise equal to what ``explain`` says, and the promises in the words of the page."""

import re
from collections.abc import Mapping
from pathlib import Path

from eventbus.catalog import PLACES, PROMISES

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"(?m)^\| (P\d+ [^|]+) \|(.*)\|$")


def table(page: str) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Return the heads and the rows of the table of promises on a page."""
    text = (ROOT / page).read_text()
    head = re.search(r"(?m)^\| promise \|(.*)\|$", text)
    assert head is not None
    return cells(head[1]), {match[1]: tuple(cells(match[2])) for match in ROW.finditer(text)}


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")]


def test_delivery_page() -> None:
    """The one table is the catalogue's, word for word and in its order."""
    heads, rows = table("docs/delivery.md")
    assert heads == list(PLACES)
    assert list(rows.items()) == list(PROMISES.items())


def test_every_promise_is_spelt_out() -> None:
    """Every row of the table has its sentence on the page, under the same number and name."""
    text = (ROOT / "docs/delivery.md").read_text()
    spelt = re.findall(r"(?m)^\*\*(P\d+ [\w ]+?)(?: everywhere)?\.?\*\*", text)
    assert [promise.lower() for promise in spelt] == [promise.lower() for promise in PROMISES]


def test_readme() -> None:
    """The readme shows the columns of it that are shipped."""
    heads, rows = table("README.md")
    assert heads == ["inline", "memory", "store"]
    places = [PLACES.index(head) for head in heads]
    expected: Mapping[str, tuple[str, ...]] = {
        promise: tuple(kept[place] for place in places) for promise, kept in PROMISES.items()
    }
    assert list(rows.items()) == list(expected.items())
