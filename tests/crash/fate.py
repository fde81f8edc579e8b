"""Stop or kill this process at the chosen passing of a chosen point around the verbs of a store."""

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from eventbus.store import Settlement, Store
from eventbus.stores.sqlalchemy import SQLAlchemyStore
from eventbus.stores.sqlite import SQLiteStore

POINTS = (
    "in_transaction", "before_commit", "after_commit", "after_claim", "in_handler", "after_effect", "before_settle",
    "after_settle", "in_mail",
)  # fmt: skip


@dataclass(slots=True)
class Fate:
    """Send this process a signal at the ``left``-th passing of ``point``."""

    point: str = ""
    left: int = 0
    kind: signal.Signals = signal.SIGKILL

    def passes(self, point: str) -> None:
        """Note that a point is passed."""
        if point == self.point and self.left:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), self.kind)


class Doomed:
    """Pass the points around the verbs of a store, and write down who was given which right."""

    fate: Fate
    diary: Path

    def begin(self, session: object | None = None) -> AbstractAsyncContextManager[Any]:
        """Pass the points around a commit."""
        return _Commit(super().begin(session), self.fate)  # type: ignore[misc]

    async def claim(self, *args: Any, **options: Any) -> Any:
        """Pass the point after a claim."""
        claimed = await super().claim(*args, **options)  # type: ignore[misc]
        for entry in claimed.entries:
            append(self.diary, f"claimed {entry.seq} {entry.claims}")
        if claimed.entries:
            self.fate.passes("after_claim")
        return claimed

    async def settle(self, settlements: Sequence[Settlement]) -> frozenset[int]:
        """Pass the points around a settlement."""
        self.fate.passes("before_settle")
        lost: frozenset[int] = await super().settle(settlements)  # type: ignore[misc]
        for one in settlements:
            if one.seq not in lost:
                append(self.diary, f"{one.outcome} {one.seq} {one.claims}")
        self.fate.passes("after_settle")
        return lost


class _Commit(AbstractAsyncContextManager[Any]):
    def __init__(self, inner: AbstractAsyncContextManager[Any], fate: Fate) -> None:
        self.inner = inner
        self.fate = fate

    async def __aenter__(self) -> Any:
        return await self.inner.__aenter__()

    async def __aexit__(self, *exc: object) -> bool | None:
        self.fate.passes("before_commit")
        answer = await self.inner.__aexit__(*exc)
        self.fate.passes("after_commit")
        return answer


def doomed(url: str, fate: Fate, diary: Path) -> Store:
    """Return the store that a URL names, with the points around its verbs."""
    store = store_of(url)
    base: Any = type(store)
    store.__class__ = type(f"Doomed{base.__name__}", (Doomed, base), {"fate": fate, "diary": diary})
    return store


def store_of(url: str) -> Any:
    """Return the store that a URL names; it makes its tables."""
    return SQLiteStore.from_url(url) if url.startswith("sqlite:") else SQLAlchemyStore(engine_of(url), create=True)


def engine_of(url: str) -> AsyncEngine | Engine:
    """Return an engine, a plain one for SQLite: its sessions are not cut in the middle when a handler times out."""
    return create_engine(url) if url.startswith("sqlite+pysqlite:") else create_async_engine(url)


@asynccontextmanager
async def kept(url: str) -> AsyncIterator[Store]:
    """Yield the store that a URL names, and let go of its connections."""
    if url.startswith("sqlite:"):
        yield SQLiteStore.from_url(url)
        return
    engine = engine_of(url)
    yield SQLAlchemyStore(engine, create=True)
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        engine.dispose()


def append(path: Path, line: str) -> None:
    """Append a line in one write, so that a kill leaves whole lines or none."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, f"{line}\n".encode())
    finally:
        os.close(handle)
