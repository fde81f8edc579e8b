"""Apply each mutant to a copy of the tree, run the test that has to notice, and print what became of it.

``python -m tests.mutants`` runs all of them, with arguments those whose file, fault or test contains one. A mutant that
survives, a line that is there no longer (or twice), and a test that fails without any mutant are failures.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.table import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
TREE = ("eventbus", "tests", "pyproject.toml")
PATIENCE = 180
"""Seconds after which a test has noticed: it hangs."""
FAILED = 1
"""What pytest returns when tests ran and some failed; anything else above 0 says that they did not run."""


def run(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests in a tree; return what pytest returned and printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", "30", *tests]
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return FAILED, "it hung"
    return done.returncode, done.stdout


def verdict(tree: Path, mutant: Mutant) -> str:
    """Break a line, run the tests, mend it again; return "" if they noticed, else what is wrong."""
    path = tree / mutant.file
    whole = path.read_text()
    if (count := whole.count(mutant.line)) != 1:
        return f"its line is there {count} times: bring {Path(__file__).with_name('table.py')} up to date"
    path.write_text(whole.replace(mutant.line, mutant.broken))
    try:
        code, told = run(tree, mutant.tests)
    finally:
        path.write_text(whole)
    if code == FAILED:
        return ""
    return "survived" if code == 0 else f"its tests did not run:\n{told}"


def main(words: Sequence[str]) -> int:
    """Run the chosen mutants; return 1 if anything is wrong."""
    chosen = [
        one for one in MUTANTS if not words or any(word in f"{one.file} {one.breaks} {one.tests}" for word in words)
    ]
    wrong, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        for name in TREE:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        code, told = run(tree, sorted({test for one in chosen for test in one.tests}))
        if code:
            print(f"the tests fail without any mutant:\n{told}")
            return 1
        for number, mutant in enumerate(chosen, 1):
            fault = verdict(tree, mutant)
            wrong += bool(fault)
            print(f"{number:3d} {mutant.file}: {mutant.breaks}: {fault or 'killed'}", flush=True)
    took = time.monotonic() - began
    print(f"{len(chosen)} mutants, {len(chosen) - wrong} killed, {wrong} not, in {took:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
