"""Make the example shop importable, and serve it as ``make demo`` does."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
sys.path.append(str(EXAMPLES))

LEASE = 30.0
"""Seconds that a shop has which nobody kills. With the two of the demonstration, handlers time out while they wait for
their turn to write, and e-mails go out again, wherever the tests are not all that the machine does."""


@dataclass(frozen=True)
class Served:
    """One shop in processes of its own."""

    process: subprocess.Popen[str]
    """The parent of the one that serves."""
    url: str
    printed: str


def serve(*arguments: str, lease: float = LEASE) -> Served:
    """Start the shop and return it once it has said where it is."""
    command = [sys.executable, str(EXAMPLES / "shop" / "serve.py"), *arguments]
    environment = {**os.environ, "SHOP_LEASE": str(lease)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return Served(process, found[0], printed)
    _, errors = process.communicate()
    raise AssertionError(f"the shop ended with {process.returncode}:\n{printed}{errors}")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return the folder in which a served shop keeps its file."""
    return tmp_path / "data"


@pytest.fixture
def lease() -> float:
    """Return how long a killed process's work rests: a test that kills wants less."""
    return LEASE


@pytest.fixture
def served(data: Path, lease: float) -> Iterator[Served]:
    """Return a served shop, and end it."""
    shop = serve("--port", "0", "--data", str(data), lease=lease)
    yield shop
    shop.process.kill()
    shop.process.communicate(timeout=30)  # not before the process that serves has followed its parent
