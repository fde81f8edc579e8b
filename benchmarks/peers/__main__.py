"""Run the peers and this library side by side, in an environment that has them, and print what each takes."""

import asyncio
import json
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from benchmarks.bench_import import importing
from benchmarks.measure import FULL, QUICK, Effort, Loop, Sample, race, turns
from benchmarks.peers.work import DIRECT, WORKS
from benchmarks.report import facts, markdown, text, write_page

LATEST = Path(__file__).parents[1] / "results" / "latest-peers.json"
OURS = "eventbus"
IMPORT = "import"
MODULES = {DIRECT: "plain", OURS: "ours"}
PEERS = {
    "diator": "diator.mediator",
    "mediatr": "mediatr",
    "python-cqrs": "cqrs",
    "lato": "lato",
    "pyee": "pyee.asyncio",
    "blinker": "blinker",
    "fastapi-events": "fastapi_events.dispatcher",
    "bubus": "bubus",
    "messagebus": "messagebus",
    "faststream": "faststream.redis",
}
"""Package -> what a user of it imports."""
Taken = dict[str, dict[str, Sample]]
"""Work -> library -> seconds."""


async def measure(effort: Effort) -> tuple[Taken, dict[str, str]]:
    """Return what each work takes each library, and why some were left out."""
    taken: Taken = {}
    missing: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        loops: dict[str, Mapping[str, Loop]] = {}
        for name in (DIRECT, OURS, *PEERS):
            try:
                module = import_module(f"benchmarks.peers.{MODULES.get(name) or f'with_{name}'.replace('-', '_')}")
                loops[name] = await stack.enter_async_context(module.opened())
            except Exception as error:
                missing[name] = f"{type(error).__name__}: {error}"
        for work in WORKS:
            able = {name: some[work] for name, some in loops.items() if work in some}
            for name in list(able):
                try:
                    await able[name](2)
                except Exception as error:
                    missing[f"{name}, {work}"] = f"{type(error).__name__}: {error}"
                    del able[name]
            taken[work] = await race(effort, able)
    takes = {DIRECT: importing("asyncio"), OURS: importing(OURS, "fastapi")}
    takes |= {name: importing(PEERS[name], "fastapi") for name in PEERS if name in loops}
    await turns(1, takes)
    taken[IMPORT] = await turns(effort.some(5), takes)
    return taken, missing


def table(taken: Taken) -> list[Sequence[str]]:
    """Return what each library takes, in multiples of plain Python."""
    lines: list[Sequence[str]] = [("× plain Python", *taken)]
    for name in (OURS, *PEERS):
        cells = [
            f"{samples[name].best / samples[DIRECT].best:,.3g}" if name in samples else "" for samples in taken.values()
        ]
        if any(cells):
            lines.append((name if name == OURS else f"{name} {version(name)}", *cells))
    return lines


def main() -> int:
    parser = ArgumentParser("python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--json", type=Path, default=LATEST, help="where the numbers go")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs, measures nothing")
    parser.add_argument("--write-docs", type=Path, metavar="PAGE", help="put the table into a page, at its markers")
    chosen = parser.parse_args()
    logging.disable(logging.INFO)
    known = facts()
    taken, missing = asyncio.run(measure(QUICK if chosen.quick else FULL))
    lines = table(taken)
    print(text(lines))
    for name, why in missing.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    results = {work: {name: asdict(sample) for name, sample in samples.items()} for work, samples in taken.items()}
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(f"{json.dumps({'facts': known, 'missing': missing, 'results': results}, indent=1)}\n")
    if chosen.write_docs:
        made = {"peers": markdown(lines), "facts peers": ", ".join(f"{name} {value}" for name, value in known.items())}
        write_page(chosen.write_docs, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
