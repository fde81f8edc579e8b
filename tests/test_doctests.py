"""Run every example in the package's docstrings, and see that the public names have one."""

import doctest
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

import eventbus
from eventbus import EventBus, MissingExtraError, Module

MODULES = sorted(found.name for found in pkgutil.walk_packages(eventbus.__path__, "eventbus."))
SHOWN = [
    *(eventbus.Command, eventbus.Context, eventbus.Event, EventBus, eventbus.Limits, Module, eventbus.Retry),
    *(eventbus.message, Module.handles, Module.on, EventBus.publish, EventBus.explain, EventBus.running),
]
"""What users write first, each with an example of its own."""


def load(name: str, absent: Callable[[str], NoReturn]) -> ModuleType:
    """Return a module of the package; one whose library is not installed is absent."""
    try:
        return importlib.import_module(name)
    except MissingExtraError as error:
        absent(str(error))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(
    name: str, absent: Callable[[str], NoReturn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example of a module runs, in an empty directory, and prints what it says."""
    monkeypatch.chdir(tmp_path)
    module = load(name, absent)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(module, name):
        runner.run(test, out=report.append)
    assert "" == "".join(report)


@pytest.mark.parametrize("thing", SHOWN, ids=lambda thing: thing.__qualname__)
def test_public_names_have_examples(thing: Any) -> None:
    """What users write first is shown by an example."""
    tests = doctest.DocTestFinder(recurse=False).find(thing, thing.__qualname__)
    assert [] != [example for test in tests for example in test.examples]


@pytest.mark.parametrize("text", ["1 + 1\n3\n", "1 / 0\n", "print('x')\n"], ids=["other", "error", "unexpected"])
def test_failing_example_is_found(text: str) -> None:
    """An example that fails or prints something else is found."""
    test = doctest.DocTestParser().get_doctest(f">>> {text}", {}, "sample", None, 0)
    report: list[str] = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert "Failed example" in "".join(report)
