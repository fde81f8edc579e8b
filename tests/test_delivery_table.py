"""Keep what the pages promise equal to what ``explain`` says, and the promises in the words of the page."""

import re
from collections.abc import Mapping
from pathlib import Path

from eventbus.catalog import PLACES, PROMISES, kept_by
from eventbus.transport import connect

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"(?m)^\| (P\d+ [^|]+) \|(.*)\|$")
BROKERS = {"Redis": "redis", "RabbitMQ": "amqp", "NATS": "nats", "Kafka": "kafka"}


def table(page: str) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Return the heads and the rows of the table of promises on a page."""
    text = (ROOT / page).read_text()
    head = re.search(r"(?m)^\| promise \|(.*)\|$", text)
    assert head is not None
    rows = text[head.end() :].partition("\n\n")[0]
    return cells(head[1]), {match[1]: tuple(cells(match[2])) for match in ROW.finditer(rows)}


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")]


def test_delivery_page() -> None:
    """The one table is the catalogue's, word for word and in its order."""
    heads, rows = table("docs/delivery.md")
    assert heads == list(PLACES)
    assert list(rows.items()) == list(PROMISES.items())


def test_brokers() -> None:
    """A store makes the brokers alike; alone they keep what the second table says, which leaves out what is common."""
    text, common = (ROOT / "docs/delivery.md").read_text(), PLACES.index("broker alone")
    declared = {name: connect(f"{scheme}://localhost").capabilities for name, scheme in BROKERS.items()}
    for capabilities in declared.values():
        stored = kept_by(capabilities, stored=True)
        assert {promise: stored[promise] for promise in PROMISES} == {
            promise: kept[PLACES.index("broker with store")] for promise, kept in PROMISES.items()
        }
    alone = {name: kept_by(capabilities, stored=False) for name, capabilities in declared.items()}
    rows = {row: tuple(kept[row] for kept in alone.values()) for row in alone["Redis"]}
    expected = [
        f"| {row} | {' | '.join(kept)} |"
        for row, kept in rows.items()
        if row not in PROMISES or {*kept} != {PROMISES[row][common]}
    ]
    head = f"| alone | {' | '.join(BROKERS)} |\n|---|---|---|---|---|\n"
    assert text.partition(head)[2].partition("\n\n")[0].splitlines() == expected


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
