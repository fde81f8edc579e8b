"""Have another library measure itself, in a process of its own, which takes turns with us."""

import json
import os
import shutil
import subprocess
import sys
from asyncio import create_subprocess_exec
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

__all__ = ("Asked", "Take", "asking")

PYTHON = os.environ.get("EVENTBUS_BENCH_PEERS") or str(Path(__file__).parents[1] / ".venv-peers/bin/python")
"""Which interpreter has the peers."""
Take = Callable[[], Awaitable[float]]
Asked = Callable[[str, int], Take] | None
"""Have the peer do a work so many times, if it is there."""


@asynccontextmanager
async def asking(peer: str, module: str, *arguments: str) -> AsyncGenerator[Asked]:
    """Yield how to have ``benchmarks.peers.<module>`` measure something, or None if the peer is not installed."""
    if shutil.which(PYTHON) is None:
        print(f"{peer} is left out: make bench-peers installs it", file=sys.stderr)
        yield None
        return
    process = await create_subprocess_exec(
        PYTHON, "-m", f"benchmarks.peers.{module}", *arguments, cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    asks, answers = process.stdin, process.stdout

    async def ask(work: str, count: int) -> float:
        asks.write(f"{json.dumps([work, count])}\n".encode())
        answer = await answers.readline()
        if not answer:
            raise RuntimeError(f"{peer} ended while it was to {work}")
        return float(answer)

    try:
        if not await answers.readline():
            print(f"{peer} is left out: it did not start", file=sys.stderr)
            yield None
        else:
            yield lambda work, count: partial(ask, work, count)
    finally:
        asks.close()
        await process.wait()
