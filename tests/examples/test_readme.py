"""The readme's step from memory to a file is the two lines that it shows, and no more."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def block(language: str) -> str:
    """Return the first block of a language."""
    found = re.search(rf"(?ms)^```{language}\n(.*?)^```$", README.read_text())
    assert found is not None
    return found[1]


def test_two_lines_make_it_durable(tmp_path: Path) -> None:
    """With its two lines changed the first program keeps the e-mail in a file, until a process sends it."""
    program, lines = block("python"), block("diff").splitlines()
    before = [line[1:] for line in lines if line.startswith("-")]
    after = [line[1:] for line in lines if line.startswith("+")]
    assert (2, 2, 4) == (len(before), len(after), len(lines))
    for old, new in zip(before, after, strict=True):
        assert 1 == program.count(f"{old}\n")
        program = program.replace(f"{old}\n", f"{new}\n")
    printed = ""
    for _ in range(10):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        assert "" == done.stderr
        assert "order 42" in done.stdout
        printed += done.stdout
        if "e-mail about the lamp" in printed:
            break
    assert "e-mail about the lamp" in printed
    assert (tmp_path / "shop.db").exists()
