"""Keep the public surface: what is exported, that importing stays light, and that installing adds nothing."""

import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

import eventbus
from eventbus import errors

ROOT = Path(__file__).parents[1]

PROMISED = {
    *("Command", "Context", "DeadEntry", "Event", "EventBus", "Gap", "Limits", "Module", "Receipt", "Reject"),
    *("Retry", "RetryLater", "Transaction", "message"),
}
HEAVY = {
    *("aio_pika", "aiobotocore", "aiokafka", "fastapi", "google", "nats", "opentelemetry.sdk", "prometheus_client"),
    *("psycopg", "redis", "rich", "sqlalchemy", "sqlite3", "starlette", "zmq"),
}


def test_all_is_a_tuple_without_twins() -> None:
    """The exported names are listed once."""
    assert isinstance(eventbus.__all__, tuple)
    assert len(set(eventbus.__all__)) == len(eventbus.__all__)


@pytest.mark.parametrize("name", eventbus.__all__)
def test_exported_name_is_documented(name: str) -> None:
    """Every exported name can be imported and says what it is."""
    assert (getattr(eventbus, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", sorted(PROMISED | set(errors.__all__)))
def test_promised_name_is_exported(name: str) -> None:
    """The names that the documentation promises, and every error, import from the root."""
    assert name in eventbus.__all__


def test_import_is_light() -> None:
    """Importing the package loads no framework, no database and no client library."""
    code = "import sys; before = set(sys.modules); import eventbus; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    assert "eventbus" in loaded
    assert HEAVY & set(loaded) == set()


@pytest.mark.packaging
@pytest.mark.timeout(300)
def test_install_adds_no_package(tmp_path: Path, absent: Callable[[str], NoReturn]) -> None:
    """Installing into a plain FastAPI environment adds this package and touches no other."""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"

    def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)

    if pip("install", "fastapi", "-c", "constraints.txt").returncode:
        absent("no package index: FastAPI could not be installed")
    before = set(pip("list", "--format=freeze").stdout.split())
    built = pip("install", ".")
    assert built.returncode == 0, built.stderr
    after = set(pip("list", "--format=freeze").stdout.split())
    assert after - before == {"eventbus==0.1.0"}
    assert before - after == set()
    installed = pip("show", "--files", "eventbus").stdout.split()
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "eventbus").rglob("*.*") if path.suffix != ".pyc"}
    assert shipped | {"eventbus/py.typed"} <= set(installed)
