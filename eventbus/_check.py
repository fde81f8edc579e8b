"""What ``eventbus check`` looks for: faults of the wiring, what waits for nobody, and names that were there before."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventbus._commands import Unusable, in_loop
from eventbus._extras import load
from eventbus._screen import as_json, plain, say
from eventbus.errors import WiringError

if TYPE_CHECKING:
    from eventbus.bus import EventBus
    from eventbus.registry import Registry
    from eventbus.store import Backlog

__all__ = ("check",)

Names = Mapping[str, Mapping[str, Any]]


def check(bus: "EventBus", options: argparse.Namespace) -> int:
    """Compile, compare the names with a snapshot, and look for what waits for nobody."""
    if options.write and options.snapshot is None:
        raise Unusable("--write needs the file to write: --snapshot names.json --write")
    faults: list[str] = []
    notes: list[str] = []
    try:
        registry = bus.engine.registry
    except WiringError as error:
        return _told(options, list(error.faults), notes)
    store = bus.wiring.store

    async def look() -> int:
        if not options.offline and store is not None and store.shared:
            async with store:
                _strays(registry, await store.backlog(), faults, notes)
        return 0

    in_loop(look)
    if options.snapshot is not None:
        now, file = _names(registry), Path(options.snapshot)
        if options.write:
            file.write_text(json.dumps(now, indent=2) + "\n")
            notes.append(f"{file}: {len(now['handlers'])} handler(s) and {len(now['messages'])} message(s) written")
        else:
            before = _read(file)
            faults.extend(_changes(before, now, file, _aliases(registry)))
            new = [name for kind in before for name in now[kind] if name not in before[kind]]
            notes.extend(f"{name} is new and not in {file} yet: --write puts it there" for name in new)
    return _told(options, faults, notes)


def _told(options: argparse.Namespace, faults: Sequence[str], notes: Sequence[str]) -> int:
    if options.json:
        as_json({"ok": not faults, "faults": faults, "notes": notes})
        return bool(faults)
    for text in (*faults, *(f"note: {note}" for note in notes)):
        say(plain(text))
    say(f"{len(faults)} fault(s)" if faults else "all is well")
    return bool(faults)


def _strays(registry: "Registry", backlog: Sequence["Backlog"], faults: list[str], notes: list[str]) -> None:
    """Find recipients that wait for a handler that is not here, and handlers here that nothing reaches."""
    ours = {registry.queue(known.handler) for known in registry.known}
    former = {f"{registry.owner}/{alias}" for alias in _aliases(registry)}
    cure = "run a process that has it, name it in aliases=, or end it with `eventbus forget`"
    for one in backlog:
        lost = one.recipient.startswith(f"{registry.owner}/")
        if one.recipient in ours | former or ">" in one.recipient:
            continue
        if one.waiting and (lost or not one.announced):
            why = "this application has no such handler" if lost else "nobody has announced it for a day"
            faults.append(f"{one.recipient}: {one.waiting} wait and {why}: {cure}")
        elif lost and one.announced:
            notes.append(f"{one.recipient} gets messages and this application has no such handler: {cure}")
    outwards: list[str] = load("eventbus.health:stranded")(registry, [one for one in backlog if ">" in one.recipient])
    faults.extend(f"{fault}: name it in transports=, or end it with `eventbus forget`" for fault in outwards)
    announced = {one.recipient for one in backlog if one.announced}
    if not ours & announced:  # no process has ever run here, or none for a day
        return
    routed = {registry.queue(known.handler) for subject in registry.subjects.values() for known in subject.routed}
    notes.extend(
        f"{name} is announced by nobody yet: what is published before a process that has it starts does not reach it"
        for name in sorted(routed - announced)
    )


def _aliases(registry: "Registry") -> set[str]:
    return {alias for known in registry.known for alias in known.handler.options.aliases}


def _names(registry: "Registry") -> dict[str, Names]:
    """Return what others rely on: the names of handlers and messages, and what the latter mean."""
    subjects = sorted(registry.subjects.values(), key=lambda subject: subject.spec.name)
    return {
        "handlers": {name: {} for name in sorted(known.handler.name for known in registry.known)},
        "messages": {
            one.spec.name: {
                "kind": "command" if one.command else "event",
                "version": one.spec.version,
                "key": one.spec.key,
            }
            for one in subjects
        },
    }


def _read(file: Path) -> dict[str, Names]:
    try:
        told: Any = json.loads(file.read_text())
        return {
            kind: {str(name): dict(facts) for name, facts in told[kind].items()} for kind in ("handlers", "messages")
        }
    except FileNotFoundError:
        raise Unusable(f"there is no {file}: --write makes it") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unusable(f"{file} is no snapshot ({error}): --write makes it anew") from error


def _changes(before: Mapping[str, Names], now: Mapping[str, Names], file: Path, aliases: set[str]) -> Iterator[str]:
    """Yield every name of a snapshot that is gone or means something else."""
    for name in before["handlers"]:
        if name not in now["handlers"] and name not in aliases:
            yield (
                f"handler {name} is gone since {file}: add aliases=[{name!r}] to the handler that takes its place, "
                f"or run `eventbus forget {name}` once no process has it; then --write"
            )
    for name, was in before["messages"].items():
        if (found := now["messages"].get(name)) is None:
            yield (
                f"message {name} is gone since {file}: what is under way waits for a process that knows the name, and "
                f"dies in the end: keep a class with name={name!r} until none is left, then --write"
            )
            continue
        if found["version"] < was.get("version", 1):
            yield (
                f"message {name} went back from version {was['version']} to {found['version']}: what is under way is "
                "newer than this application and waits: raise version= again"
            )
        for fact in ("kind", "key"):
            if found[fact] != was.get(fact):
                yield (
                    f"message {name} has changed its {fact} from {was.get(fact)} to {found[fact]}: what is under way "
                    "keeps the old one; give it another name=, or accept it with --write"
                )
