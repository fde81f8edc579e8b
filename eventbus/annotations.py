"""What an annotation means where its function was written: resolved one at a time, as late as possible."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ForwardRef, get_type_hints

__all__ = ("UnresolvedError", "layers", "resolved")


class UnresolvedError(Exception):
    """Say that an annotation means nothing at run time; it never leaves the engine."""


def resolved(annotation: Any, call: Callable[..., Any]) -> Any:
    """Return what an annotation means where a callable was written. Raises ``UnresolvedError`` if nobody can tell."""
    if not isinstance(annotation, str | ForwardRef):
        return annotation
    text = annotation if isinstance(annotation, str) else annotation.__forward_arg__
    try:
        outer, inner = _names(call)
        return get_type_hints(SimpleNamespace(__annotations__={"it": text}), outer, inner, include_extras=True)["it"]
    except Exception as error:
        raise UnresolvedError(
            f"is annotated {text!r}, which means nothing here ({error}): import it at run time"
        ) from error


def layers(call: Any) -> Iterator[Any]:
    """Yield the callables that one is made of, outermost first; a class is made of nothing."""
    for _ in range(100):  # there are objects that claim to wrap another for ever
        if inspect.isclass(call):
            return
        yield call
        if isinstance(call, functools.partial):
            call = call.func
        elif hasattr(call, "__wrapped__"):
            call = call.__wrapped__
        elif not inspect.isroutine(call):
            call = type(call).__call__
        else:
            return


def _names(call: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the names that the annotations of a callable may use: of its module, then nearer ones."""
    outer: dict[str, Any] = {}
    while isinstance(call, functools.partial):
        call = call.func
    target: Any = call
    if inspect.isclass(call):
        module = sys.modules.get(call.__module__)
        outer = vars(module) if isinstance(module, ModuleType) else {}
        target = call.__init__ if inspect.isfunction(call.__init__) else call.__new__
    *_, function = layers(target)
    inner = dict(getattr(function, "__globals__", {}))
    code = getattr(function, "__code__", None)
    for name, cell in zip(code.co_freevars if code else (), getattr(function, "__closure__", None) or (), strict=False):
        try:
            inner[name] = cell.cell_contents
        except ValueError:
            inner.pop(name, None)  # bound later than this
    inner |= {parameter.__name__: parameter for parameter in getattr(function, "__type_params__", ())}
    return outer or inner, inner
