"""Measure what a claim costs on any store where many and where very many entries wait."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from time import perf_counter

from benchmarks.measure import Effort, Goal, Row, quiet_gc, turns
from eventbus.store import NewEntry, Recipient, Settlement, Store

__all__ = ("claim_rows",)

WAITING = (100_000, 500_000)
CLAIMED = 100


@asynccontextmanager
async def waiting(store: Store, count: int, keyed: bool) -> AsyncGenerator[Callable[[], Awaitable[float]]]:
    """Yield what times one claim in a new store where so many entries wait, a tenth as many keys among them."""
    recipient = Recipient("bench/take", ordered=keyed)
    async with store:
        for first in range(0, count, 5_000):
            numbers = range(first, min(first + 5_000, count))
            await store.add(
                [
                    NewEntry(
                        message_id=f"{number:036}",
                        type="bench.told",
                        body=b'{"number":1}',
                        key=f"customer-{number % max(count // 10, 1)}",
                        subscribers=False,
                        recipients=(recipient,),
                    )
                    for number in numbers
                ]
            )
        cursor = ""

        async def claim() -> float:
            nonlocal cursor
            with quiet_gc():
                start = perf_counter()
                claimed = await store.claim(recipient, owner="bench", limit=CLAIMED, lease=30.0, cursor=cursor)
                taken = perf_counter() - start
            if not claimed.entries:
                raise RuntimeError("nothing was claimed")
            cursor = claimed.cursor
            await store.settle([Settlement(entry.seq, entry.claims, "release") for entry in claimed.entries])
            return taken

        yield claim


async def claim_rows(
    effort: Effort, made: Callable[[str], AbstractAsyncContextManager[Store]], where: str
) -> Sequence[Row]:
    """Return the comparisons for the stores that ``made`` makes, a new one for each name; ``where`` names them."""
    found: list[Row] = []
    for keyed in (False, True):
        sizes = [effort.of(size) for size in WAITING]
        async with AsyncExitStack() as stack:
            claims = dict[str, Callable[[], Awaitable[float]]]()
            for size in sizes:
                store = await stack.enter_async_context(made(f"{size}_{keyed}"))
                claims[str(size)] = await stack.enter_async_context(waiting(store, size, keyed))
            took = await turns(effort.rounds * 4, claims)
        least, *more = sizes
        kind = "ordered" if keyed else "unordered"
        found += [
            Row(f"{where}: claim {CLAIMED} {kind} of {size:,} waiting", took[str(size)], f"of {least:,} waiting",
                took[str(least)], Goal(1.5))
            for size in more
        ]  # fmt: skip
    return found
