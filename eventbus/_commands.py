"""What the commands do, each with a bus and the options; the return value is the exit code."""

import argparse
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC
from typing import TYPE_CHECKING, Any

from eventbus._extras import load
from eventbus._screen import age, as_json, plain, progress, say, table

if TYPE_CHECKING:
    from eventbus.bus import EventBus
    from eventbus.dead import DeadLetters
    from eventbus.store import DeadEntry, Store


PAGE = 1_000
"""Dead entries that are looked at together."""
PIECE = 250
"""Dead entries that are replayed or discarded in one transaction."""


class Unusable(Exception):  # noqa: N818 - it is about what was asked for
    """Say why a command has nothing to work on."""


def failed(error: BaseException, code: int) -> int:
    """Say what went wrong on standard error and return the exit code."""
    lines = str(error).split("\n")
    sys.stderr.write("\n".join(["eventbus: " + plain(lines[0]), *map(plain, lines[1:])]) + "\n")
    return code


def in_loop(action: Callable[[], Awaitable[int]]) -> int:
    """Run what needs an event loop and return its exit code."""
    return int(load("anyio:run")(action))


def _store(bus: "EventBus") -> "Store":
    store = bus.wiring.store
    if store is None or not store.shared:
        raise Unusable(
            "this bus has no store that another process could look into: EventBus(store='sqlite:///shop.db')"
        )
    return store


def explain(bus: "EventBus", options: argparse.Namespace) -> int:
    """Say who handles a message, where it goes and what is promised."""
    explained = bus.explain(options.words[0])
    if options.json:
        as_json(asdict(explained))
    else:
        say(str(explained))
    return 0


def topology(bus: "EventBus", options: argparse.Namespace) -> int:
    """Show everything that the bus knows, and make what is missing at the brokers if asked to."""
    explained = bus.explain()
    if options.declare:

        async def declare() -> int:
            await bus.engine.declare()
            return 0

        in_loop(declare)
    if options.json:
        as_json(asdict(explained))
    elif options.mermaid:
        lines, places = ["flowchart LR"], dict[str, str]()

        def place(kind: str, name: str) -> str:
            """Return the node of a name; nothing in it can be read as Mermaid."""
            node = places.setdefault(f"{kind} {name}", f"n{len(places)}")
            return f'{node}["{name.replace(chr(34), "#quot;")}"]'

        for message in explained.messages:
            here = place("message", message.name)
            lines.append(f"    {here}")
            lines.extend(f"    {here} --> {place('transport', to)}" for to in message.route if to != "inline")
            for one in message.handlers:
                start = here if one.source == "inline" else place("transport", one.source)
                label = "" if one.source == "inline" else f'|"{message.name.replace(chr(34), "#quot;")}"| '
                lines.append(f"    {start} --> {label}{place('handler', one.name)}")
        say("\n".join(lines))
    else:
        say(str(explained))
    return 0


def health(bus: "EventBus", options: argparse.Namespace) -> int:
    """Show what waits and what is dead."""
    store, lag = _store(bus), options.lag.total_seconds()

    async def look() -> int:
        async with store:
            backlog = await store.backlog()
        faults: list[str] = load("eventbus.health:stranded")(bus.engine.registry, backlog)
        faults += [
            f"{one.recipient}: the first has been due for {one.oldest:.0f} s"
            for one in backlog
            if one.oldest is not None and one.oldest > lag
        ]
        if options.json:
            as_json({"healthy": not faults, "faults": faults, "recipients": [one._asdict() for one in backlog]})
            return bool(faults)
        rows = [
            (
                one.recipient,
                one.waiting,
                "" if one.oldest is None else age(one.oldest),
                one.dead,
                "yes" if one.announced else "NO",
            )
            for one in backlog
        ]
        table(("RECIPIENT", "WAITING", "OLDEST DUE", "DEAD", "ANNOUNCED"), rows)
        say("\n".join(["NOT WELL", *map(plain, faults)]) if faults else "well")
        return bool(faults)

    return in_loop(look)


def forget(bus: "EventBus", options: argparse.Namespace) -> int:
    """End a handler."""
    store, registry = _store(bus), bus.engine.registry
    name = options.words[0] if set("/>") & set(options.words[0]) else f"{registry.owner}/{options.words[0]}"
    if name in {registry.queue(known.handler) for known in registry.known}:
        raise Unusable(f"{name} is a handler of this application, which would announce it again: remove it first")
    if name in {f"{registry.owner}>{transport}" for transport in registry.wiring.transports}:
        raise Unusable(f"{name} is a transport of this application, which would go on with it: remove it first")

    async def forget() -> int:
        async with store:
            forgotten = await store.forget(name)
        if options.json:
            as_json({"handler": name, "dead": forgotten})
        else:
            say(f"{name} is forgotten; {forgotten} waiting message(s) are dead now")
        return 0

    return in_loop(forget)


def ddl(bus: "EventBus", options: argparse.Namespace) -> int:
    """Print the statements that make the tables."""
    dialect = options.dialect or getattr(bus.wiring.store, "dialect", None)
    if dialect is None:
        raise Unusable("this store makes its tables by itself; for another say --dialect postgresql")
    try:
        say(load("eventbus.stores.sqlalchemy:ddl")(dialect).rstrip("\n"))
    except ValueError as error:
        raise Unusable(str(error)) from error
    return 0


def asyncapi(bus: "EventBus", options: argparse.Namespace) -> int:
    """Print the AsyncAPI document."""
    as_json(load("eventbus.documents:asyncapi")(bus, options.version))
    return 0


def schema(bus: "EventBus", options: argparse.Namespace) -> int:  # noqa: ARG001 - a command takes them
    """Print the JSON Schemas."""
    as_json(load("eventbus.documents:schemas")(bus))
    return 0


class _Desk:
    """Look at the dead of a store without starting the bus, so that nothing is announced and no broker is needed."""

    def __init__(self, bus: "EventBus") -> None:
        self._store = _store(bus)
        self.owner = bus.engine.owner
        self.limits = bus.limits

    def graveyards(self, change: str | None = None) -> "Sequence[Store]":
        return (self._store,)

    def wake(self, recipients: frozenset[str] | None) -> None:
        """Leave it to the workers to notice."""

    @asynccontextmanager
    async def open(self) -> "AsyncGenerator[DeadLetters]":
        async with self._store:
            letters: DeadLetters = load("eventbus.dead:DeadLetters")(lambda: self)
            yield letters


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    return {"message": options.type, "handler": options.handler, "since": options.since, "error": options.error}


def list_(bus: "EventBus", options: argparse.Namespace) -> int:
    """List dead messages."""

    async def look() -> int:
        async with _Desk(bus).open() as dead:
            found = await dead.find(limit=options.limit, **_chosen(options))
        _print_dead(found, options)
        if len(found) == options.limit and not options.json:
            say(f"the oldest {options.limit}; --limit shows more")
        return 0

    return in_loop(look)


def _print_dead(found: Sequence[Any], options: argparse.Namespace) -> None:
    if options.json:
        as_json([{name: value for name, value in asdict(one).items() if name != "body"} for one in found])
        return
    rows = [
        (
            one.id,
            f"{one.time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
            one.message,
            one.handler,
            one.failures,
            one.error.partition("\n")[0],
        )
        for one in found
    ]
    if not rows:
        say("none")
        return
    table(("ID", "SINCE", "MESSAGE", "HANDLER", "FAILURES", "ERROR"), rows)


def show(bus: "EventBus", options: argparse.Namespace) -> int:
    """Show one dead message."""

    async def look() -> int:
        async with _Desk(bus).open() as dead:
            found = await dead.get(options.words[0])
        if found is None:
            return failed(LookupError(f"no dead message has the id {options.words[0]!r}"), 1)
        if options.json:
            as_json(asdict(found))
        else:
            shown = asdict(found) | {"body": found.body.decode(errors="backslashreplace")}
            say("\n".join(f"{name}: {plain(value)}" for name, value in shown.items()))
        return 0

    return in_loop(look)


def end(verb: str, bus: "EventBus", options: argparse.Namespace) -> int:
    """Replay or discard, by ids or by filters: those that are dead now, piece by piece, so that others get in between.

    What another operator was quicker with is not counted.
    """
    chosen, ids = _chosen(options), tuple(options.words)
    if not ids and not any(chosen.values()):
        raise Unusable(f"say which to {verb}: ids, or one of --type, --handler, --since, --error")

    async def end() -> int:
        async with _Desk(bus).open() as dead:
            found = _found(dead, ids, chosen, options.limit)
            if options.dry_run:
                would = [one async for one in found]
                _print_dead(would, options)
                if would and not options.json:
                    say(f"{verb} --dry-run: {len(would)} message(s), and nothing is done")
                return 0
            count, todo = 0, list(ids) if ids and options.limit is None else [one.id async for one in found]
            try:
                with progress(verb, len(todo)) as advance:
                    async for piece in _paced(todo, options.rate):
                        count += await getattr(dead, verb)(*piece, **chosen)
                        advance(len(piece))
            finally:  # also when interrupted: the rest is as dead as before
                if options.json:
                    as_json({verb: count})
                else:
                    say(f"{verb}: {count} message(s)")
        return 0

    return in_loop(end)


async def _paced(ids: Sequence[str], rate: float | None) -> AsyncGenerator[Sequence[str]]:
    """Yield ids in pieces, not more of them in a second than ``rate``."""
    clock, sleep = load("anyio:current_time"), load("anyio:sleep_until")
    start, size = clock(), PIECE if rate is None else max(1, min(PIECE, int(rate / 4)))
    for place in range(0, len(ids), size):
        if rate is not None:
            await sleep(start + place / rate)
        yield ids[place : place + size]


async def _found(
    dead: "DeadLetters", ids: Sequence[str], chosen: dict[str, Any], limit: int | None
) -> AsyncGenerator["DeadEntry"]:
    """Yield dead entries, oldest first, a page of them in memory."""
    left, after, wanted = limit, None, set(ids)
    while left is None or left > 0:
        page = await dead.find(limit=PAGE, after=after, **chosen)
        for one in [one for one in page if not wanted or one.id in wanted][:left]:
            yield one
            left = None if left is None else left - 1
        if len(page) < PAGE:
            return
        after = page[-1].id
