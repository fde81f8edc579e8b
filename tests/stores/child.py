"""Use one SQLite file beside other processes, and say afterwards what happened.

    python -m tests.stores.child work|publish|burst FILE NUMBER

``work`` claims and settles until nothing waits and prints its log; ``publish`` writes its messages, each twice;
``burst`` writes for ever, a row of its own with each message, and prints every id whose commit was confirmed.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import anyio

from eventbus.limits import Limits
from eventbus.store import Entry, Interest, NewEntry, Recipient, Settlement
from eventbus.stores.sqlite import SQLiteStore

PLAIN = Recipient("svc/plain")
ORDERED = Recipient("svc/ordered", ordered=True)
INTERESTS = (Interest(PLAIN.name, "t"), Interest(ORDERED.name, "t", ordered=True))
MESSAGES = 200
"""What each publisher writes."""
PUBLISHERS = 2
TOTAL = PUBLISHERS * MESSAGES * len(INTERESTS)
LEASE = 0.3


async def publish(store: SQLiteStore, number: int) -> None:
    """Write messages of a few keys, in the order of their ids within each key, and everything twice."""
    for n in range(0, MESSAGES, 5):
        await store.announce(INTERESTS)
        entries = [
            NewEntry(message_id=f"{number}-{m:05}", type="t", body=b"", key=f"{number}-{m % 4}" if m % 3 else None)
            for m in range(n, n + 5)
        ]
        async with store.begin() as unit:
            if n % 2:
                await unit.session.fetchall("SELECT count(*) FROM eventbus_subscription")
            await unit.add(entries)
        await store.add(entries[:2])


async def work(store: SQLiteStore, number: int) -> None:
    """Claim, settle in every way, abandon some, until everything is done."""
    chance = random.Random(number)
    log: list[tuple[Any, ...]] = []
    cursor = ""
    while True:
        got: list[Entry] = []
        for recipient in (PLAIN, ORDERED):
            limit = chance.randint(1, 16)
            claimed = await store.claim(recipient, owner=str(number), limit=limit, lease=LEASE, cursor=cursor)
            cursor = claimed.cursor
            got += claimed.entries
        now = time.monotonic_ns()
        log += (("claim", one.seq, one.claims, one.recipient, one.lane, one.message_id, now) for one in got)
        settlements = [settle(one, chance) for one in got if chance.random() > 0.03]
        before = time.monotonic_ns()
        lost = await store.settle(settlements)
        log += ((one.outcome, one.seq, one.claims, one.seq in lost, before) for one in settlements)
        if not got and await done(store) == TOTAL:
            break
    print(json.dumps(log))


async def done(store: SQLiteStore) -> int:
    """Count what is done, in a transaction that holds the writer for two statements."""
    async with store.begin() as unit:
        await unit.session.fetchone("SELECT 1")
        found = await unit.session.fetchone("SELECT count(*) FROM eventbus_entry WHERE state = 1")
    return int(found[0]) if found else 0


def settle(entry: Entry, chance: random.Random) -> Settlement:
    """Return some settlement, in the end done."""
    roll = chance.random()
    if entry.claims > 6 or roll < 0.85:
        return Settlement(entry.seq, entry.claims, "done")
    return Settlement(entry.seq, entry.claims, "again" if roll < 0.95 else "release", chance.choice((0.0, 0.02)))


async def burst(store: SQLiteStore, number: int) -> None:
    """Write rows with messages in many tasks until killed."""
    await store.announce(INTERESTS)
    async with store.begin() as unit:
        await unit.session.execute("CREATE TABLE IF NOT EXISTS business (id TEXT PRIMARY KEY)")

    async def task(k: int) -> None:
        n = 0
        while True:
            n += 1
            id_ = f"{os.getpid()}-{k}-{n}"
            async with store.begin() as unit:
                if k % 2:
                    await unit.session.execute("INSERT INTO business VALUES (?)", (id_,))
                await unit.add([NewEntry(message_id=id_, type="t", body=b"x" * 300)])
            os.write(1, f"{id_}\n".encode())

    async with anyio.create_task_group() as group:
        for k in range(number):
            group.start_soon(task, k)


async def main(what: str, path: Path, number: int) -> None:
    """Run one of the three."""
    async with SQLiteStore(path, synchronous="normal", limits=Limits(lease=30.0)) as store:
        await {"work": work, "publish": publish, "burst": burst}[what](store, number)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
