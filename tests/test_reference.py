"""Keep the reference complete: every public name, every error and every limit has its place."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import eventbus
import eventbus.fastapi
import eventbus.testing
from eventbus import Limits, errors
from eventbus.middlewares import logging, metrics, tracing
from eventbus.stores import sqlite
from eventbus.stores.sqlite import SQLiteSession
from eventbus.testing import Harness, conformance, pytest_plugin

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


def codes(page: str) -> str:
    """Return what a page says in code."""
    return "\n".join(re.findall(r"`([^`\n]+)`", (REFERENCE / page).read_text()))


@pytest.mark.parametrize("name", sorted(set(eventbus.__all__) - set(errors.__all__) | {"Reject", "RetryLater"}))
def test_name_is_listed(name: str) -> None:
    """Every public name is on the page of names."""
    assert re.search(rf"\b{name}\b", codes("api.md"))


@pytest.mark.parametrize("name", errors.__all__)
def test_error_is_listed(name: str) -> None:
    """Every error has a row, and the right parent among ours is named where it is not the root."""
    row = re.search(rf"(?m)^\| `{name}` \|(.*)$", (REFERENCE / "errors.md").read_text())
    assert row is not None
    parent = getattr(errors, name).__bases__[0].__name__
    assert parent in ("EventBusError", "Exception") or f"`{parent}`" in row[1]


@pytest.mark.parametrize("method", [name for name in vars(eventbus.EventBus) if not name.startswith("_")])
def test_method_is_listed(method: str) -> None:
    """Every method of the bus is on the page of names, but for what the test kit uses."""
    inner = {"engine", "limits", "name", "rewired", "share_overrides", "wiring"}
    assert method in inner or re.search(rf"\bbus\.{method}\b", codes("api.md"))


def test_limits_are_listed() -> None:
    """Every limit is listed with its default."""
    cells = re.findall(r"`(\w+)` \| ([\d_.]+) \|", (REFERENCE / "api.md").read_text())
    assert {name: float(value) for name, value in cells} == {field.name: field.default for field in fields(Limits)}


def test_store_is_listed() -> None:
    """What an application imports from the embedded store, and what its session can do, is named."""
    methods = [name for name in vars(SQLiteSession) if not name.startswith("_")]
    for name in (*sqlite.__all__, *methods):
        assert re.search(rf"\b{name}\b", codes("api.md"))


@pytest.mark.parametrize("name", ["Logging", "Metrics", "Count", "Tracing"])
def test_middlewares_are_listed(name: str) -> None:
    """What an application imports from the middlewares is named."""
    assert name in (*logging.__all__, *metrics.__all__, *tracing.__all__)
    assert re.search(rf"\b{name}\b", codes("api.md"))


def test_doors_are_listed() -> None:
    """What an application imports from the FastAPI door is named."""
    for name in ("install", "BusDep", "TransactionDep"):
        assert name in eventbus.fastapi.__all__
        assert re.search(rf"\b{name}\b", codes("api.md"))


def test_test_kit_is_listed() -> None:
    """What tests import, the fixtures, and what a harness can do, are named, but for what only the kit itself uses."""
    inner = {"abandon", "begin", "call", "calls", "check", "connect", "explain", "served"}
    methods = {name for name in vars(Harness) if not name.startswith("_")} - inner
    for name in (*eventbus.testing.__all__, *conformance.__all__, *pytest_plugin.__all__):
        assert re.search(rf"\b{name}\b", codes("api.md")), name
    for name in methods:
        assert re.search(rf"\bt\.{name}\b", codes("api.md")), name
