"""Run the type checkers on ``api.py`` and compare what they refuse with what the file says they must refuse."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
API = Path(__file__).with_name("api.py")
MARK = re.compile(r"# E: (\w+)")

Checker = Callable[[Path], dict[int, str]]


def run(*command: str) -> str:
    """Return what a checker prints under the project's own settings."""
    done = subprocess.run([sys.executable, "-m", *command], check=False, capture_output=True, text=True, cwd=ROOT)
    if done.returncode > 1:
        raise RuntimeError(f"{command[0]} does not run: {done.stdout}{done.stderr}")
    return done.stdout


def mypy(path: Path) -> dict[int, str]:
    """Return the errors of mypy by line."""
    found = map(json.loads, run("mypy", "--output=json", "--no-error-summary", str(path)).splitlines())
    errors = (error for error in found if error["severity"] == "error" and Path(error["file"]).name == path.name)
    return {error["line"]: error["message"] for error in errors}


def pyright(path: Path) -> dict[int, str]:
    """Return the errors of pyright by line."""
    found = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable, str(path)))["generalDiagnostics"]
    errors = (error for error in found if error["severity"] == "error" and Path(error["file"]).name == path.name)
    return {error["range"]["start"]["line"] + 1: error["message"] for error in errors}


def marked(path: Path, checker: str) -> set[int]:
    """Return the lines that a checker must refuse."""
    marks = {number: MARK.search(line) for number, line in enumerate(path.read_text().splitlines(), 1)}
    named = {number: mark[1] for number, mark in marks.items() if mark}
    unknown = set(named.values()) - {"mypy", "pyright", "both"}
    if unknown:
        raise ValueError(f"# E: takes mypy, pyright or both, not {', '.join(sorted(unknown))}")
    return {number for number, name in named.items() if name in {checker, "both"}}


def differences(path: Path, checker: Checker) -> list[str]:
    """Return each line that is refused and not marked, or marked and not refused."""
    refused, expected = checker(path), marked(path, checker.__name__)
    found = [f"{path.name}:{line}: {refused[line]}" for line in sorted(refused.keys() - expected)]
    return found + [f"{path.name}:{line}: was accepted" for line in sorted(expected - refused.keys())]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_api(checker: Checker) -> None:
    """Both checkers refuse exactly the lines of ``api.py`` that say so."""
    assert differences(API, checker) == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_differences_bite(checker: Checker, tmp_path: Path) -> None:
    """A refused line without a mark is found, and a mark without refusal."""
    path = tmp_path / "sample.py"
    path.write_text("a: int = ''\nb: int = ''  # E: both\nc: int = 1  # E: both\nd: list = []  # E: both\n")
    assert [found.split(": ")[0] for found in differences(path, checker)] == ["sample.py:1", "sample.py:3"]
