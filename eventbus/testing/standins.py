"""Put other functions in the place of handlers, for the length of one test."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from eventbus.context import Context
from eventbus.handler import Handler
from eventbus.middleware import CallNext
from eventbus.module import Module

__all__ = ("Stub", "Stubs", "Understudy")


class Understudy(Module):
    """Be a module some of whose handlers are replaced, and around whose handlers goes one more middleware."""

    def __init__(
        self,
        module: Module,
        replaced: Mapping[Callable[..., Any], Callable[..., Any]],
        innermost: Callable[[Context, CallNext], Any],
    ) -> None:
        around = (*module.middleware, innermost)
        super().__init__(module.name, messages=module.messages, imports=module.imports, middleware=around)
        self._module = module
        self._replaced = replaced

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """Return the handlers of the module, under their own names, with the functions in their places."""
        return tuple(
            replace(one, func=self._replaced.get(one.func, one.func)) if self._replaced else one
            for one in self._module.handlers
        )

    def freeze(self) -> None:
        """Refuse further handlers of the module: a bus has compiled it."""
        self._module.freeze()


@dataclass(slots=True, eq=False)
class Stub:
    """Stand in for one handler; ``messages`` are what it was called with."""

    handler: str
    returns: Any = None
    raises: BaseException | None = None
    calls: Callable[[Any], Any] | None = None
    messages: list[Any] = field(default_factory=list[Any])

    async def answer(self, message: object) -> Any:
        """Note the message; raise, or return what is to be returned."""
        self.messages.append(message)
        if self.raises is not None:
            raise self.raises
        if self.calls is None:
            return self.returns
        result = self.calls(message)
        return await result if inspect.isawaitable(result) else result


class Stubs:
    """Hold the stubs of one test; ``stand_in`` is the innermost middleware of every handler."""

    def __init__(self) -> None:
        self._stubs: dict[str, Stub] = {}

    async def stand_in(self, ctx: Context, call_next: CallNext) -> Any:
        """Call the stub of a handler instead, if it has one."""
        stub = self._stubs.get(ctx.handler)
        return await (call_next(ctx) if stub is None else stub.answer(ctx.message))

    def add(self, stub: Stub) -> Stub:
        """Let a stub stand in from now on."""
        self._stubs[stub.handler] = stub
        return stub


def named(handler: str | Callable[..., Any], known: Iterable[Handler]) -> str:
    """Return the stable name of a handler, given by name or function. Raises ``ValueError`` if there is none."""
    handlers = list(known)
    for one in handlers:
        if handler in (one.name, one.func):
            return one.name
    names = ", ".join(sorted(one.name for one in handlers)) or "none at all"
    raise ValueError(f"there is no handler {handler!r}; known are {names}")
