"""Run all benchmarks or those that are named, print a table, keep the numbers as JSON."""

import asyncio
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import FULL, QUICK, Row
from benchmarks.report import HEAD, Facts, against_goals, cells, dump, facts, load, markdown, text, write_page

NAMES = ("send", "publish", "memory", "sqlite", "postgres", "claims", "brokers", "fastapi", "import")
LATEST = Path(__file__).parent / "results" / "latest.json"
OLDEST = "send"
"""What ``--oldest`` measures."""


def arguments() -> Namespace:
    parser = ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(NAMES)}; default: all")
    parser.add_argument("--json", type=Path, default=LATEST, help="where the numbers go")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs, measures nothing")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="put the tables into a page, at their markers")
    parser.add_argument("--oldest", metavar="PYTHON", help=f"measure {OLDEST} with another interpreter too")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.names) - set(NAMES)):
        parser.error(f"no benchmark is called {', '.join(unknown)}: there are {', '.join(NAMES)}")
    return chosen


def run(names: Sequence[str], *, quick: bool) -> dict[str, list[Row]]:
    """Run benchmarks one after another, and print each table when it is there."""
    results: dict[str, list[Row]] = {}
    for name in names:
        bench = import_module(f"benchmarks.bench_{name}")
        rows = asyncio.run(bench.rows(QUICK if quick else FULL))
        if not rows:
            continue
        results[name] = rows
        print(f"\n{name}: {bench.__doc__}\n")
        print(text([HEAD, *map(cells, results[name])]), flush=True)
    return results


def run_elsewhere(python: str, *, quick: bool) -> tuple[Facts, Mapping[str, Sequence[Row]]]:
    """Run ``OLDEST`` with another interpreter."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        command = [python, "-m", "benchmarks", OLDEST, "--json", str(path), *(["--quick"] if quick else [])]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        return load(path)


def tables(known: Facts, results: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Return what belongs between the markers of a page: the tables, and what the numbers depend on."""
    python = ".".join(known["python"].split(".")[:2])
    made = {f"{name} {python}": markdown([HEAD, *map(cells, rows)]) for name, rows in results.items()}
    return made | {f"facts {python}": ", ".join(f"{name} {value}" for name, value in known.items())}


def main() -> int:
    chosen = arguments()
    known = facts()
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    if chosen.quick:
        print("--quick: these numbers mean nothing")
    results = run(chosen.names or NAMES, quick=chosen.quick)
    dump(chosen.json, known, results)
    made = tables(known, results) | {"goals": markdown(against_goals(results))}
    if chosen.oldest:
        made |= tables(*run_elsewhere(chosen.oldest, quick=chosen.quick))
    if chosen.write_docs:
        missing = write_page(chosen.write_docs, made)
        if missing:
            print(f"{chosen.write_docs} has no markers for: {', '.join(missing)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
