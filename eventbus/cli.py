"""The command line: run workers, and look at a bus and its dead; ``eventbus COMMAND ... app.main:bus``.

Exit codes: 0 all is well or done; 1 something was found, or the application failed; 2 the command line or the
application's name is wrong; 3 the store cannot be used; 124 and 128 + signal from a worker that was ended.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from eventbus import _check, _commands
from eventbus._commands import Unusable, failed
from eventbus._extras import load
from eventbus.errors import EventBusError, StoreError, TransportError

if TYPE_CHECKING:
    from eventbus.bus import EventBus

__all__ = ("main", "parser")

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
Command = Callable[["EventBus", argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code.

    Args:
        arguments: what stands behind the program's name; default: what was typed.
    """
    sys.exit(_main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    commands = parser()
    options, rest = commands.parse_known_args(arguments)
    command: argparse.ArgumentParser = options.parser
    if unknown := [word for word in rest if word.startswith("-")]:
        command.error(f"unknown: {' '.join(unknown)}")
    if options.run is None:  # no command: the list of them says more than an error
        command.print_help(sys.stderr)
        return 2
    words = [*options.words, *rest]
    least, most = options.takes
    if not least < len(words) <= most + 1:
        command.error("the application stands last, such as app.main:bus" if len(words) <= least else "too many words")
    *options.words, options.app = words
    run: Callable[..., int] = options.run
    try:
        return run(options) if run is _worker else run(load("eventbus.supervisor:find")(options.app).bus, options)
    except (LookupError, Unusable) as error:
        return failed(error, 2)
    except (StoreError, TransportError) as error:
        return failed(error, 3)
    except (EventBusError, OSError) as error:
        return failed(error, 1)
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    root = argparse.ArgumentParser(
        prog="eventbus",
        description="Run workers, and look at a bus and its dead.",
        epilog="The application stands last: eventbus worker app.main:app; eventbus COMMAND --help has the options.",
        allow_abbrev=False,
    )
    root.set_defaults(parser=root, run=None)
    commands = root.add_subparsers(metavar="COMMAND")
    worker = _command(commands, "worker", _worker, "run handlers until SIGTERM or SIGINT", json=False)
    worker.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a handler, module or transport; again for more"
    )
    worker.add_argument("--processes", type=_number, default=1, metavar="N", help="how many processes (default: 1)")
    worker.add_argument(
        "--concurrency", type=_number, metavar="N", help="handlings at once per handler that does not say it itself"
    )
    worker.add_argument(
        "--alive", metavar="FILE", help="touch FILE while nothing is stuck; FILE.0, FILE.1 with several processes"
    )
    worker.add_argument(
        "--reload", action="store_true", help="for development: drain and start anew when a Python file changes"
    )
    worker.add_argument(
        "--reload-dir", action="append", default=[], metavar="DIR", help="where to look for changes, instead of here"
    )
    check = _command(commands, "check", _check.check, "compile, and find what waits for nobody")
    check.add_argument("--offline", action="store_true", help="compile only, open no store")
    check.add_argument("--snapshot", metavar="FILE", help="find names that were in FILE and are gone or changed")
    check.add_argument("--write", action="store_true", help="write the names of now into the snapshot")
    _command(commands, "explain", _commands.explain, "say who handles NAME, where it goes and what is promised", "NAME")
    topology = _command(commands, "topology", _commands.topology, "show every message, its way and its handlers")
    topology.add_argument("--mermaid", action="store_true", help="as a Mermaid flowchart")
    topology.add_argument("--declare", action="store_true", help="make what is missing at the brokers")
    health = _command(commands, "health", _commands.health, "show what waits and what is dead")
    health.add_argument(
        "--lag",
        type=_duration,
        default=timedelta(minutes=5),
        metavar="AGE",
        help="how long a due message may wait (default: 5m)",
    )
    _command(
        commands,
        "forget",
        _commands.forget,
        "end HANDLER, which nobody runs: what waits for it dies",
        "HANDLER",
    )
    ddl = _command(commands, "ddl", _commands.ddl, "print the statements that make the tables", json=False)
    ddl.add_argument("--dialect", metavar="NAME", help="postgresql, mariadb, mysql or sqlite (default: the store's)")
    asyncapi = _command(commands, "asyncapi", _commands.asyncapi, "print the AsyncAPI 3.0 document of all messages")
    asyncapi.add_argument(
        "--version", default="1.0.0", metavar="TEXT", help="the version of the application (default: 1.0.0)"
    )
    _command(commands, "schema", _commands.schema, "print the JSON Schema of each message")
    dead = commands.add_parser("dead", help="look at the dead, replay or discard them", allow_abbrev=False)
    dead.set_defaults(parser=dead, run=None)
    verbs = dead.add_subparsers(metavar="VERB")
    _filters(_command(verbs, "list", _commands.list_, "list dead messages"), limit=100)
    _command(verbs, "show", _commands.show, "show one dead message with its body", "ID")
    for name, run, about in (
        ("replay", partial(_commands.end, "replay"), "handle dead messages again, their failures forgotten"),
        ("discard", partial(_commands.end, "discard"), "forget dead messages for good"),
    ):
        verb = _command(verbs, name, run, about, "[ID...]")
        _filters(verb, limit=None)
        verb.add_argument("--rate", type=_rate, metavar="N/s", help="not more at once: 20/s, 100/m (default: no limit)")
        verb.add_argument("--dry-run", action="store_true", help="only say which")
    return root


def _command(
    commands: Any, name: str, run: Callable[..., int], about: str, words: str | None = None, json: bool = True
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    takes = (0, 0) if words is None else (0, 10_000) if "..." in words else (1, 1)
    named = f"{words} APP" if words else "APP"
    command.add_argument(
        "words", nargs="*", metavar=named, help="APP is module:name of a bus, or of an application it is installed on"
    )
    command.usage = f"{command.prog} [OPTIONS] {named}"
    command.set_defaults(run=run, parser=command, takes=takes, json=False)
    if json:
        command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _filters(command: argparse.ArgumentParser, limit: int | None) -> None:
    command.add_argument("--type", metavar="NAME", help="only messages of this name")
    command.add_argument("--handler", metavar="NAME", help="only those of this handler")
    command.add_argument(
        "--since", type=_since, metavar="WHEN", help="only what died since: 2026-01-31T12:00+00:00, or 30m, 2h, 7d ago"
    )
    command.add_argument("--error", metavar="TEXT", help="only those whose error contains TEXT")
    command.add_argument(
        "--limit",
        type=_number,
        default=limit,
        metavar="N",
        help=f"at most so many, oldest first (default: {limit or 'all'})",
    )


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1, not {text!r}")
    return int(text)


def _duration(text: str) -> timedelta:
    if not text[:-1].isdecimal() or text[-1:] not in SECONDS:
        raise argparse.ArgumentTypeError(f"takes a time such as 30s, 5m, 2h or 7d, not {text!r}")
    try:
        return timedelta(seconds=int(text[:-1]) * SECONDS[text[-1]])
    except (OverflowError, ValueError):
        raise argparse.ArgumentTypeError("takes a time that a clock can count") from None


def _rate(text: str) -> float:
    number, _, unit = text.partition("/")
    if not number.isdecimal() or int(number) < 1 or (unit or "s") not in SECONDS:
        raise argparse.ArgumentTypeError(f"takes a rate such as 20/s, 100/m or 500/h, not {text!r}")
    return int(number) / SECONDS[unit or "s"]


def _since(text: str) -> datetime:
    try:
        if text[:-1].isdecimal() and text[-1:] in SECONDS:
            return datetime.now(UTC) - _duration(text)
        when = datetime.fromisoformat(text)
        return when if when.tzinfo else when.astimezone()
    except (OSError, OverflowError, ValueError):
        raise argparse.ArgumentTypeError(f"takes a time such as 2026-01-31T12:00+00:00 or 2h, not {text!r}") from None


def _worker(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if gone := [name for name in options.reload_dir if not Path(name).is_dir()]:
        raise Unusable(f"--reload-dir {gone[0]}: there is no such directory")
    reload = tuple(options.reload_dir) or ((".",) if options.reload else ())
    job = load("eventbus.supervisor:Job")(
        app=options.app,
        only=tuple(options.only),
        concurrency=options.concurrency,
        processes=options.processes,
        alive=options.alive,
        reload=reload,
    )
    return int(load("eventbus._crew:supervise" if reload or job.processes > 1 else "eventbus.supervisor:work")(job))


if __name__ == "__main__":
    main()
