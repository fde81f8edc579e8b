"""Keep the shape of the package: who may import whom, the budgets, and what is never written.

Each check takes the package's directory and returns its findings, so that a small bad tree can prove that it bites.
"""

import ast
import builtins
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "eventbus"

GROUND = (
    "errors",
    "_extras",
    "_urls",
    "_loop",
    "_signal",
    "limits",
    "clock",
    "message",
    "_strict_json",
    "envelope",
    "cloudevents",
    "context",
)
PROMISES = ("codec", "middleware", "transport", "store", "_mailbox")
ENGINE = (
    *(
        "retry",
        "link",
        "annotations",
        "parameters",
        "inject",
        "handler",
        "module",
        "routes",
        "wiring",
        "registry",
        "fanout",
        "invoker",
    ),
    *(
        "dispatch",
        "entries",
        "dead",
        "delivery",
        "lanes",
        "ledger",
        "claims",
        "channel",
        "worker",
        "keeping",
        "sources",
    ),
    *("live", "broadcast"),
    *("catalog", "engine", "health"),
    *("config", "bus"),
)
ROOT = "__init__"
KEEPERS = ("middlewares", "stores", "transports")
DOORS = ("testing", "fastapi", "documents", "dashboard", "_screen", "supervisor", "_crew", "_commands", "_check", "cli")
FOLDERS = (*KEEPERS, "testing", "dashboard")
ORDER = (*GROUND, *PROMISES, *ENGINE, ROOT, *KEEPERS, *DOORS)
"""Whoever stands higher may be imported by whoever stands lower, never the other way round."""

LINES = 400
PARAMETERS = 8
WIDE = {"EventBus.__init__", "Module.on", "Module.handles"}
BANNED_IMPORTS = {"pickle", "marshal", "shelve", "yaml"}
BANNED_CALLS = {"eval", "exec"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef
Findings = list[str]
Check = Callable[[Path], Findings]
Class = tuple[str, str]


def sources(package: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield each file of the package with its syntax tree."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), parsed(path.read_text())


@cache
def parsed(text: str) -> ast.Module:
    """Return the syntax tree of a file, which every check reads."""
    return ast.parse(text)


def nodes(package: Path) -> Iterator[tuple[str, ast.AST]]:
    """Yield every node of every file."""
    for name, tree in sources(package):
        for node in ast.walk(tree):
            yield name, node


def unit(name: str) -> str:
    """Return the entry of ``ORDER`` that a file belongs to, or the file's name if it belongs to none."""
    parts = name.removesuffix(".py").split("/")
    return parts[0] if len(parts) == 1 + (parts[0] in FOLDERS) else name


def dotted(name: str) -> str:
    """Return the module that a file is, below the package's own name."""
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported(name: str, node: ast.AST) -> Iterator[str]:
    """Yield what a node imports of the package itself, as ``module`` or ``folder.module``; ``__init__`` is its root."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "eventbus":
                yield alias.name.partition(".")[2] or ROOT
    elif isinstance(node, ast.ImportFrom):
        here = ["eventbus", *name.split("/")[:-1]]
        start = ".".join(here[: len(here) + 1 - node.level]) if node.level else ""
        base, _, module = ".".join(filter(None, (start, node.module))).partition(".")
        if base == "eventbus" and module in FOLDERS:
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif base == "eventbus":
            yield from [module] if module else (a.name if a.name in ORDER else ROOT for a in node.names)


def own_part(name: str, target: str) -> bool:
    """Tell whether a keeper imports a private part of itself, as ``sqlite`` and ``_sqlite_rows`` are one keeper."""
    folder, _, part = target.partition(".")
    keeper = dotted(name).removeprefix(f"{folder}.").lstrip("_").split("_")[0]
    return name.startswith(f"{folder}/") and re.fullmatch(f"_{keeper}(_\\w+)?", part) is not None


def import_order(package: Path) -> Findings:
    """Find imports against the order, and files that have no place in it."""
    findings = [f"{name}: has no place in ORDER" for name, _ in sources(package) if unit(name) not in ORDER]
    for name, node in nodes(package):
        here = unit(name)
        if here not in ORDER:
            continue
        for target in imported(name, node):
            there = target.split(".")[0]
            if here in KEEPERS:
                allowed = there in (*GROUND, *PROMISES) or own_part(name, target)
            elif here == there:
                allowed = here in FOLDERS
            else:
                allowed = there in ORDER[: ORDER.index(here)]
            if not allowed:
                findings.append(f"{name}:{node.lineno}: {here} must not import {target}")
    return findings


def line_budget(package: Path) -> Findings:
    """Find files that are too long."""
    lengths = ((path, len(path.read_text().splitlines())) for path in sorted(package.rglob("*.py")))
    return [f"{path.relative_to(package)}: {lines} lines" for path, lines in lengths if lines > LINES]


def definitions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield every function below a node, with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Definition):
            if isinstance(node, Definition):
                yield f"{owner}{node.name}", node
            yield from definitions(node, f"{owner}{node.name}.")
        else:
            yield from definitions(node, owner)


def parameter_budget(package: Path) -> Findings:
    """Find functions that take too many parameters."""
    findings: Findings = []
    for name, tree in sources(package):
        for qualified, node in definitions(tree):
            positional = [*node.args.posonlyargs, *node.args.args]
            receiver = bool(positional) and positional[0].arg in {"self", "cls"}
            count = len(positional) - receiver + (0 if qualified in WIDE else len(node.args.kwonlyargs))
            if count > PARAMETERS:
                findings.append(f"{name}:{node.lineno}: {qualified} takes {count} parameters")
    return findings


def own_bases(package: Path) -> dict[Class, list[Class]]:
    """Return the bases of each class, as far as they are the package's own or built in."""
    trees = {dotted(name): (name, tree) for name, tree in sources(package)}
    known = {
        (module, node.name)
        for module, (_, tree) in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    bases: dict[Class, list[Class]] = {}
    for module, (_, tree) in trees.items():
        names = {name: (owner, name) for owner, name in known if owner == module}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eventbus."):
                origin = str(node.module).removeprefix("eventbus.")
                names |= {alias.asname or alias.name: (origin, alias.name) for alias in node.names}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            found = bases.setdefault((module, node.name), [])
            for base in node.bases:
                expression = base.value if isinstance(base, ast.Subscript) else base
                if isinstance(expression, ast.Name):
                    found.append(names.get(expression.id, ("builtins", expression.id)))
                elif isinstance(expression, ast.Attribute):
                    found += [owner for owner in known if owner[1] == expression.attr]
    return bases


def ancestors(bases: dict[Class, list[Class]], start: Class) -> set[Class]:
    """Return every class above one."""
    above: set[Class] = set()
    waiting = [*bases.get(start, ())]
    while waiting:
        base = waiting.pop()
        if base not in above:
            above.add(base)
            waiting += bases.get(base, ())
    return above


def raisable(base: Class) -> bool:
    """Tell whether a class is a built-in exception."""
    builtin = getattr(builtins, base[1], None)
    return base[0] == "builtins" and isinstance(builtin, type) and issubclass(builtin, BaseException)


def one_ancestor(package: Path) -> Findings:
    """Find classes, errors excepted, with more than one ancestor of our own."""
    bases = own_bases(package)
    findings: Findings = []
    for module, name in bases:
        above = ancestors(bases, (module, name))
        own = sorted(base[1] for base in above if base in bases)
        if len(own) > 1 and not any(map(raisable, above)):
            findings.append(f"{module}: {name} has the ancestors {', '.join(own)}")
    return findings


def nothing_banned(package: Path) -> Findings:
    """Find ways to run or load what somebody else wrote."""
    findings: Findings = []
    for name, node in nodes(package):
        used: set[str] = set()
        if isinstance(node, ast.Import):
            used = {alias.name.split(".")[0] for alias in node.names} & BANNED_IMPORTS
        elif isinstance(node, ast.ImportFrom):
            used = {(node.module or "").split(".")[0]} & BANNED_IMPORTS
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            used = {called} & BANNED_CALLS if isinstance(node.func, ast.Name) else set()
            if called in {"import_module", "__import__"}:
                used = {a.value.split(".")[0] for a in node.args if isinstance(a, ast.Constant)} & BANNED_IMPORTS
        findings += [f"{name}:{node.lineno}: uses {what}" for what in sorted(used)]
    return findings


def no_assert(package: Path) -> Findings:
    """Find assert statements, which vanish under ``python -O``."""
    return [f"{name}:{node.lineno}: assert" for name, node in nodes(package) if isinstance(node, ast.Assert)]


def no_silent_except(package: Path) -> Findings:
    """Find exceptions that are caught without a name, or swallowed."""
    findings: Findings = []
    for name, node in nodes(package):
        if isinstance(node, ast.ExceptHandler):
            empty = all(isinstance(line, ast.Pass | ast.Continue) or is_text(line) for line in node.body)
            found = node.type is None or empty
        else:
            called = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1]
            found = called == "suppress" and {"Exception", "BaseException"} & set(map(ast.unparse, node.args))
        if found:
            findings.append(f"{name}:{node.lineno}: a bare or silent except")
    return findings


def is_text(node: ast.stmt) -> bool:
    """Tell whether a statement is a docstring or ``...``."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def targets(node: ast.stmt) -> list[ast.expr]:
    """Return what a statement assigns to."""
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


def has_all(package: Path) -> Findings:
    """Find public modules without a tuple ``__all__``."""
    findings: Findings = []
    for name, tree in sources(package):
        module = name.split("/")[-1]
        private = module.startswith("_") and module != "__init__.py"
        if private or all(is_text(node) for node in tree.body):
            continue
        assigned = {ast.unparse(target): node.value for node in tree.body for target in targets(node)}
        if not isinstance(assigned.get("__all__"), ast.Tuple):
            findings.append(f"{name}: has no tuple __all__")
    return findings


CHECKS: tuple[Check, ...] = (
    import_order,
    line_budget,
    parameter_budget,
    one_ancestor,
    nothing_banned,
    no_assert,
    no_silent_except,
    has_all,
)

EIGHT = "a, b, c, d, e, f, g, h"
BAD: dict[str, tuple[Check, dict[str, str]]] = {
    "upwards": (import_order, {"codec.py": "from eventbus.bus import EventBus"}),
    "upwards, module by name": (import_order, {"codec.py": "from eventbus import bus"}),
    "upwards, relative": (import_order, {"codec.py": "from .bus import EventBus"}),
    "upwards, relative from a folder": (import_order, {"stores/sqlite.py": "from ..bus import EventBus"}),
    "upwards, plain": (import_order, {"codec.py": "import eventbus.bus"}),
    "upwards, within a function": (import_order, {"codec.py": "def f():\n    import eventbus.bus"}),
    "upwards, for types": (import_order, {"codec.py": "if TYPE_CHECKING:\n    from eventbus.bus import EventBus"}),
    "through the root": (import_order, {"codec.py": "from eventbus import EventBus"}),
    "the root itself": (import_order, {"codec.py": "import eventbus"}),
    "root to keeper": (import_order, {"__init__.py": "from eventbus.stores.memory import MemoryStore"}),
    "root to door": (import_order, {"__init__.py": "from eventbus.fastapi import install"}),
    "engine to keeper": (import_order, {"bus.py": "from eventbus.stores import memory"}),
    "keeper to engine": (import_order, {"stores/sqlite.py": "from eventbus.retry import Retry"}),
    "keeper to keeper": (import_order, {"stores/sqlite.py": "from eventbus.stores.memory import MemoryStore"}),
    "keeper to its folder": (import_order, {"stores/sqlite.py": "from eventbus.stores import memory"}),
    "keeper to another's part": (import_order, {"stores/sqlite.py": "from eventbus.stores._memory_rows import Row"}),
    "door to a lower door": (import_order, {"testing/harness.py": "from eventbus.fastapi import install"}),
    "unknown file": (import_order, {"utils.py": ""}),
    "unknown folder": (import_order, {"bus/parts.py": ""}),
    "too deep": (import_order, {"stores/sql/lite.py": ""}),
    "too long": (line_budget, {"bus.py": "\n" * (LINES + 1)}),
    "too wide": (parameter_budget, {"bus.py": f"def f({EIGHT}, *, i): ..."}),
    "too wide, async and nested": (
        parameter_budget,
        {"bus.py": f"class A:\n    async def f(self, {EIGHT}, i, /): ..."},
    ),
    "exempt only by keyword": (parameter_budget, {"bus.py": f"class Module:\n    def on(self, {EIGHT}, i): ..."}),
    "ladder": (one_ancestor, {"bus.py": "class A: ...\nclass B(A): ...\nclass C(B[int]): ..."}),
    "ladder over files": (
        one_ancestor,
        {"store.py": "class A: ...\nclass B(A): ...", "bus.py": "from eventbus.store import B as X\nclass C(X): ..."},
    ),
    "diamond": (one_ancestor, {"bus.py": "class A: ...\nclass B: ...\nclass C(A, B): ..."}),
    "pickle": (nothing_banned, {"codec.py": "def f():\n    from pickle import loads"}),
    "pickle by name": (nothing_banned, {"codec.py": "importlib.import_module('pickle')"}),
    "eval": (nothing_banned, {"codec.py": "eval('1')"}),
    "assert": (no_assert, {"codec.py": "assert 1"}),
    "bare": (no_silent_except, {"codec.py": "try: f()\nexcept: g()"}),
    "silent": (no_silent_except, {"codec.py": "try: f()\nexcept ValueError: pass"}),
    "silent by dots": (no_silent_except, {"codec.py": "try: f()\nexcept ValueError: ..."}),
    "suppressed": (no_silent_except, {"codec.py": "with contextlib.suppress(Exception): f()"}),
    "no __all__": (has_all, {"codec.py": "x = 1"}),
    "a list __all__": (has_all, {"codec.py": "__all__ = ['x']"}),
}

GOOD = {
    "__init__.py": "from eventbus.bus import EventBus\n__all__ = ('EventBus',)",
    "errors.py": "class A(Exception): ...\nclass B(A): ...\nclass C(B): ...\n__all__ = ()",
    "codec.py": "class A(Protocol[T]): ...\nclass B(A[int], Generic[T]): ...\n__all__ = ()",
    "bus.py": f"from eventbus import codec\nclass EventBus:\n    def __init__(self, *, {EIGHT}, i): ...\n__all__ = ()",
    "stores/__init__.py": '"""Keep entries."""',
    "transports/__init__.py": "__all__: tuple[str, ...] = ()",
    "stores/sqlite.py": (
        "from eventbus.store import Store\nfrom eventbus.stores._sqlite_rows import Row\n"
        "with suppress(KeyError): f()\n__all__ = ()"
    ),
    "testing/harness.py": (
        "import eventbus\nfrom eventbus import EventBus\nfrom eventbus.stores.memory import MemoryStore\n"
        "from eventbus.testing.rehearsal import Plan\n__all__ = ()"
    ),
    "cli.py": "from eventbus.dashboard import page\nfrom eventbus.fastapi import install\n__all__ = ()",
}


def plant(package: Path, files: dict[str, str]) -> Path:
    """Write a small source tree."""
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package(check: Check) -> None:
    """The package keeps its own rules."""
    assert check(PACKAGE) == []


@pytest.mark.parametrize("case", BAD)
def test_check_bites(case: str, tmp_path: Path) -> None:
    """Each check finds what it is there to find."""
    check, files = BAD[case]
    assert len(check(plant(tmp_path, files))) == 1


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_spares(check: Check, tmp_path: Path) -> None:
    """No check finds fault with what is allowed."""
    assert check(plant(tmp_path, GOOD)) == []
