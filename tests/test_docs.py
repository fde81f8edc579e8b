"""Run the documentation: its Python, its output, its commands and its links, as docs/contributing.md says.

Each check takes a page or a set of pages and returns its findings, so that a small bad page can prove that it bites.
"""

import json
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
NOT_RUN = 3
SHELLS = {"bash", "sh", "shell", "console"}
MISSPELT = {"", "py", "python3", "pycon"}

FENCE = re.compile(r"(?ms)^ *(?P<mark>`{3,}|~{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^ *(?P=mark)[`~]* *$")
LINK = re.compile(r"(?m)\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s*(\S+)|(?:href|src)=\"([^\"]+)\"")
HEADING = re.compile(r"(?m)^#+\s+(.*?)\s*#*$")
MAKE = re.compile(r"(?m)(?:^|&&|;|\|)[ \t]*(?:\$ )?(?:\w+=\S+ )*make((?: +[\w.=/-]+)+)")

END = "\x1e"
DRIVER = f"""
import asyncio, ast, inspect, json, sys, types
path, blocks = json.load(sys.stdin)
page = sys.modules["__main__"] = types.ModuleType("__main__")
with asyncio.Runner() as runner:
    for line, text in blocks:
        code = compile("\\n" * line + text, path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        awaiting = eval(code, page.__dict__)
        if inspect.iscoroutine(awaiting):
            async def run(awaiting=awaiting):
                await awaiting
            runner.run(run())
        print({END!r}, end="", flush=True)
"""

Findings = list[str]


@dataclass(frozen=True, slots=True)
class Fence:
    """One fenced block of a page."""

    line: int
    words: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def runs(self) -> bool:
        return self.language == "python" and "no-run" not in self.words


def fences(page: Path) -> list[Fence]:
    """Return the fenced blocks of a page."""
    text = page.read_text()
    return [
        Fence(text.count("\n", 0, match.start()) + 1, tuple(match["info"].split()), textwrap.dedent(match["text"]))
        for match in FENCE.finditer(text)
    ]


def expected_outputs(blocks: list[Fence]) -> Iterator[tuple[Fence, Fence | None]]:
    """Yield each output block with the Python block that it directly follows."""
    for before, block in zip([None, *blocks], blocks, strict=False):
        if block.words == ("text", "output"):
            yield block, before if before and before.runs else None


def matches(expected: str, actual: str) -> bool:
    """Compare an output with what the page says, in which ``...`` stands for anything."""
    pattern = ".*".join(map(re.escape, expected.strip().split("...")))
    return re.fullmatch(pattern, actual.strip(), re.DOTALL) is not None


def run_python(page: Path, directory: Path) -> Findings:
    """Run a page from top to bottom and compare what it prints with what it says."""
    blocks = fences(page)
    runnable = [block for block in blocks if block.runs]
    findings = [
        f"{page.name}:{out.line}: output without a Python block" for out, of in expected_outputs(blocks) if not of
    ]
    if not runnable:
        return findings
    command = [sys.executable, "-W", "error", "-c", DRIVER]
    script = json.dumps([str(page), [(block.line, block.text) for block in runnable]])
    done = subprocess.run(command, check=False, input=script, capture_output=True, text=True, cwd=directory, timeout=50)
    if done.returncode:
        return [*findings, f"{page.name}: {done.stderr}"]
    printed = dict(zip(runnable, done.stdout.split(END), strict=False))
    for out, of in expected_outputs(blocks):
        if of and not matches(out.text, printed[of]):
            findings.append(f"{page.name}:{out.line}: the output is really\n{printed[of]}")
    return findings


def fence_kinds(pages: Iterable[Path], _: Path) -> Findings:
    """Find blocks that escape their check: no known language, no reason, or too many that do not run."""
    blocks = [(page, block) for page in pages for block in fences(page)]
    findings = [
        f"{page.name}:{b.line}: name the language as python, text, ..." for page, b in blocks if b.language in MISSPELT
    ]
    skipped = [(page, block) for page, block in blocks if block.language == "python" and not block.runs]
    findings += [f"{page.name}:{b.line}: say why it does not run" for page, b in skipped if len(b.words) < 4]
    if len(skipped) > NOT_RUN:
        findings.append(f"{len(skipped)} Python blocks do not run, {NOT_RUN} are the most")
    return findings


def toml_parses(pages: Iterable[Path], _: Path) -> Findings:
    """Find TOML that does not parse."""
    findings: Findings = []
    for page in pages:
        for block in fences(page):
            try:
                tomllib.loads(block.text if block.language == "toml" else "")
            except tomllib.TOMLDecodeError as error:
                findings.append(f"{page.name}:{block.line}: {error}")
    return findings


def make_targets(pages: Iterable[Path], root: Path) -> Findings:
    """Find commands that call a target which the Makefile does not have."""
    known = set(re.findall(r"(?m)^([\w-]+):(?!=)", (root / "Makefile").read_text()))
    findings: Findings = []
    for page in pages:
        for block in fences(page):
            named = " ".join(MAKE.findall(block.text)) if block.language in SHELLS else ""
            unknown = {word for word in named.split() if "=" not in word and not word.startswith("-")} - known
            findings += [f"{page.name}:{block.line}: no target {target}" for target in sorted(unknown)]
    return findings


def anchors(page: Path) -> set[str]:
    """Return the anchors that the headings of a page make."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_resolve(pages: Iterable[Path], root: Path) -> Findings:
    """Find relative links that lead nowhere, or out of the project."""
    findings: Findings = []
    for page in pages:
        prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
        for link in filter(None, (target for groups in LINK.findall(prose) for target in groups)):
            if re.match(r"[a-z][a-z+.-]*:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            dangling = anchor and target.suffix == ".md" and target.exists() and anchor not in anchors(target)
            if not target.is_relative_to(root) or not target.exists() or dangling:
                findings.append(f"{page.name}: {link} leads nowhere")
    return findings


Check = Callable[[Iterable[Path], Path], Findings]
CHECKS: tuple[Check, ...] = (fence_kinds, toml_parses, make_targets, links_resolve)

BAD: dict[str, tuple[Check, str]] = {
    "no language": (fence_kinds, "```\nx\n```"),
    "misspelt": (fence_kinds, "```py\nx\n```"),
    "misspelt in a list": (fence_kinds, "- a\n\n  ```py\n  x\n  ```"),
    "no reason": (fence_kinds, "```python no-run\nx\n```"),
    "too many not run": (fence_kinds, "```python no-run it needs RabbitMQ\nx\n```\n" * (NOT_RUN + 1)),
    "broken toml": (toml_parses, "~~~toml\nx = \n~~~"),
    "unknown target": (make_targets, "```bash\nFOO=1 make VENV=x nonesuch && make test\n```"),
    "unknown target after a prompt": (make_targets, "```console\n$ make nonesuch\n```"),
    "dead link": (links_resolve, "[x](nonesuch.md)"),
    "dead image": (links_resolve, '<img src="nonesuch.svg">'),
    "dead reference": (links_resolve, "[x]: nonesuch.md"),
    "dead anchor": (links_resolve, "# One\n[x](#two)"),
    "out of the project": (links_resolve, "[x](../..)"),
}

GOOD = """# One `and` two
```python
import asyncio
x = 1
await asyncio.sleep(0)
```
```python
print(x, object())
```
```text output
1 <object object at ...>
```
```python no-run it needs RabbitMQ
1 / 0
```
```toml
x = 1
```
```bash
make test VENV=x
```
[x](#one-and-two) [y](page.md#one-and-two) [z](https://example.org) `[w](nonesuch.md)`
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Return what writes a page beside a Makefile."""
    (tmp_path / "Makefile").write_text("test: x\nBIN := y\n")

    def write(text: str) -> Path:
        page = tmp_path / "page.md"
        page.write_text(f"{text}\n")
        return page

    return write


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """Every Python block of a page runs, and prints what the page says."""
    assert "\n".join(run_python(page, tmp_path)) == ""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_pages(check: Check) -> None:
    """The pages keep the conventions."""
    assert check(PAGES, ROOT) == []


@pytest.mark.parametrize("case", BAD)
def test_check_bites(case: str, write: Callable[[str], Path], tmp_path: Path) -> None:
    """Each check finds what it is there to find."""
    check, text = BAD[case]
    assert len(check([write(text)], tmp_path)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "```python\n1 / 0\n```",
        "```python\nprint(1)\n```\n```text output\n2\n```",
        "```python\nprint(1)\n```\n```toml\n```\n```text output\n1\n```",
        "```python\nimport warnings\nwarnings.warn('x')\n```",
        "```python\nimport asyncio\nawait asyncio.sleep(0)\n1 / 0\n```",
    ],
    ids=["error", "other output", "output of nothing", "warning", "error after await"],
)
def test_run_bites(text: str, write: Callable[[str], Path], tmp_path: Path) -> None:
    """A page that fails, warns or prints something else is found."""
    assert len(run_python(write(text), tmp_path)) == 1


def test_checks_spare(write: Callable[[str], Path], tmp_path: Path) -> None:
    """A good page has no findings."""
    page = write(GOOD)
    assert [finding for check in CHECKS for finding in check([page], tmp_path)] == []
    assert run_python(page, tmp_path) == []
