"""The pytest plugin: fixtures for those who ask for them, an option that rehearses, and nothing automatic."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from eventbus.testing import pytest_plugin

ROOT = Path(__file__).parents[2]
PLUGIN = "eventbus.testing.pytest_plugin"

SAMPLE = """
from eventbus import Event, EventBus, Module

class Placed(Event, name="q.placed"):
    number: int = 0

module, seen = Module("m"), []

@module.on(Placed)
async def place(event: Placed) -> None:
    seen.append(event.number)

bus = EventBus(module, routes={"q.*": "memory"})

async def test_queued(eventbus_harness):
    seen.clear()
    async with eventbus_harness(bus) as t:
        print("rehearsed" if t.rehearsal else "queued", t.rehearsal and t.rehearsal.seed)
        for number in (1, 2):
            await t.publish(Placed(number=number))
        await t.settled()
    assert set(seen) == {1, 2}

async def test_inline(eventbus_harness):
    async with eventbus_harness(bus, mode="inline") as t:
        assert t.rehearsal is None

async def test_fragile(eventbus_harness):
    seen.clear()
    async with eventbus_harness(bus) as t:
        await t.publish(Placed(number=1))
        await t.settled()
        assert seen == [1]

async def test_without():
    assert not [name for name in globals() if name.startswith("eventbus_")]
"""

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return what runs pytest on the sample with the plugin and returns what it prints."""
    (tmp_path / "test_sample.py").write_text(SAMPLE)

    def run(*arguments: str, plugin: tuple[str, ...] = ("-p", PLUGIN), path: Path = ROOT) -> str:
        command = [sys.executable, "-m", "pytest", "-s", "-v", "-o", "anyio_mode=auto", "-W", "error", *plugin]
        rest = ["-p", "no:cacheprovider", *arguments, str(tmp_path)]
        environment = {"PYTHONPATH": f"{path}:{ROOT}", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [*command, *rest], check=False, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=50
        )
        return done.stdout + done.stderr

    return run


def test_harness_by_fixture(run: Run) -> None:
    """Without the option the fixture is the harness, and every test runs once."""
    printed = run("-k", "asyncio")
    assert "4 passed" in printed
    assert "queued None" in printed


def test_option_rehearses(run: Run) -> None:
    """With the option each test that asks for the harness runs under so many seeds, and others as they are."""
    printed = run("--eventbus-rehearse=5", "-k", "asyncio and not fragile")
    assert "11 passed" in printed
    assert all(f"rehearsed {seed}" in printed for seed in range(5))
    assert "seed5" not in printed


def test_failure_can_be_played_again(run: Run) -> None:
    """A failure names its seed, and that seed alone fails again with the same schedule."""
    printed = run("--eventbus-rehearse=8", "-k", "asyncio and fragile", "-x")
    seed = printed.partition("pytest --eventbus-seed=")[2].split()[0]
    again = run(f"--eventbus-seed={seed}", "-k", "asyncio and fragile")
    played = [text.partition("played:\n")[2].partition("\nE")[0].split("\n\n")[0] for text in (printed, again)]
    assert "comes" in played[0]
    assert played[0].splitlines()[:3] == played[1].splitlines()[:3]


def test_entry_point(run: Run, tmp_path: Path) -> None:
    """An installed package needs no option: pytest finds the plugin by its entry point, also if it is named as well."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    installed = tmp_path / "site" / "kit-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kit\nVersion: 1\n")
    (installed / "RECORD").write_text("")
    lines = "\n".join(f"{name} = {target}" for name, target in points.items())
    (installed / "entry_points.txt").write_text(f"[pytest11]\n{lines}\n")
    for plugin in ((), ("-p", PLUGIN)):
        assert "4 passed" in run("-k", "asyncio", plugin=plugin, path=tmp_path / "site")


def test_loading_is_light() -> None:
    """Loading the plugin brings in no framework, no client, no database and no other event loop."""
    code = f"import sys, pytest; import {PLUGIN}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert PLUGIN in loaded.split()
    assert not {"fastapi", "starlette", "httpx", "sqlite3", "trio", "sqlalchemy"} & set(loaded.split())


def test_nothing_is_automatic() -> None:
    """No fixture of the plugin reaches a test that did not ask for it."""
    for name in pytest_plugin.__all__:
        assert getattr(pytest_plugin, name)._fixture_function_marker.autouse is False
