"""Measure what importing the package adds to a process that has imported FastAPI, beside importing asyncio."""

import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import PIPE

from anyio import run_process

from benchmarks.measure import Effort, Goal, Row, turns

__all__ = ("rows",)

ROOT = Path(__file__).parents[1]
CODE = "import time{first}; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"


def importing(module: str, *before: str) -> Callable[[], Awaitable[float]]:
    """Return what times one import in a process of its own, after other imports."""
    return partial(_in_process, CODE.format(first="".join(f", {name}" for name in before), module=module))


async def _in_process(code: str) -> float:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = await run_process([sys.executable, "-c", code], cwd=ROOT, env=env, stderr=PIPE)
    return float(done.stdout)


async def rows(effort: Effort) -> Sequence[Row]:
    """Return the comparisons."""
    takes = {
        "asyncio": importing("asyncio"),
        "eventbus": importing("eventbus", "fastapi"),
        "door": importing("eventbus.fastapi", "fastapi"),
        "store": importing("eventbus.stores.sqlite", "fastapi", "eventbus"),
    }
    await turns(1, takes)  # writes the bytecode
    took = await turns(effort.some(15), takes)
    return [
        Row(
            "import eventbus, after fastapi",
            took["eventbus"],
            "import asyncio",
            took["asyncio"],
            Goal(0.3, peer="blinker 0.01"),
        ),
        Row("import eventbus.fastapi, after fastapi", took["door"], "import asyncio", took["asyncio"]),
        Row("import eventbus.stores.sqlite, after both", took["store"], "import asyncio", took["asyncio"]),
    ]
