"""Read signatures: what a handler and the dependencies below it ask for, as a plan.

FastAPI's markers are known by the names of their classes, so that nothing here imports FastAPI.
"""

import dis
import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, UnionType
from typing import Annotated, Any, ForwardRef, Literal, TypeVar, Union, cast, get_args, get_origin

from eventbus.annotations import UnresolvedError, layers, resolved
from eventbus.context import Context
from eventbus.store import Transaction

__all__ = ("BUS", "CONTEXT", "FIRST", "MESSAGE", "TRANSACTION", "Node", "Plan", "draw")

MESSAGE, CONTEXT, BUS, TRANSACTION, FIRST = range(5)
"""Where the values of a handling stand: what the frame offers, then what each node of the plan returned."""

Call = Callable[..., Any]
Overrides = Mapping[Call, Call]
Shape = Literal["coroutine", "thread", "cached", "asyncgen", "gen"]

_CACHED: Any = type(functools.cache(len))
_HTTP = {"BackgroundTasks", "HTTPConnection", "Request", "Response", "SecurityScopes", "UploadFile", "WebSocket"}
_ENTERS = {"__aenter__", "__enter__", "enter_async_context", "enter_context"}
_DOOR = "eventbus.fastapi"
"""Its ``BusDep`` and ``TransactionDep`` ask in a request for what a handler is simply offered."""
_CURE = "pass the value in the message, or override the dependency"


class _Unfit(Exception):  # noqa: N818 - it never leaves this file
    """Say why a parameter cannot be filled."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """Describe one dependency of a plan: what is called, with the values at which places."""

    name: str
    call: Call
    shape: Shape
    places: tuple[int, ...]
    function: bool = False
    """Whether it is left as soon as the handler has returned."""
    scopes: bool = False
    """Whether it may have a cancel scope or a task group of its own open where it yields.

    If so, a scope that can shield its end has to be entered before it is opened, which costs more than all the rest.
    """

    opens: bool = False
    """Whether it is a generator, opened and left."""

    def picker(self) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """Return what picks the arguments out of the values."""
        places = self.places
        if len(places) > 1:
            return cast("Callable[[Sequence[Any]], Sequence[Any]]", operator.itemgetter(*places))
        return (lambda values: (values[places[0]],)) if places else (lambda _: ())


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Describe all that has to happen before a handler can be called; ``faults`` says why it cannot."""

    handler: Node
    nodes: tuple[Node, ...]
    """Each after those it needs."""
    wanted: frozenset[int]
    """Which of CONTEXT, BUS and TRANSACTION are asked for anywhere."""
    transactions: tuple[Any, ...]
    overridden: tuple[tuple[Call, Call | None], ...]
    """What the plan was drawn under: every dependency, with its override."""
    faults: tuple[str, ...]

    def under(self, overrides: Overrides) -> tuple[tuple[Call, Call | None], ...]:
        """Return what ``overridden`` would be now."""
        return tuple((call, overrides.get(call)) for call, _ in self.overridden)

    def parts(self) -> tuple[Sequence[int], Sequence[int]]:
        """Part the nodes, so that what is left with the handler is opened after all that stays open longer."""
        generators = {index for index, node in enumerate(self.nodes) if node.opens}
        early = {index for index in generators if not self.nodes[index].function}
        if early == generators:
            return range(len(self.nodes)), ()
        for index in reversed(range(len(self.nodes))):
            if index in early:
                early.update(place - FIRST for place in self.nodes[index].places if place >= FIRST)
        return sorted(early), [index for index in range(len(self.nodes)) if index not in early]


@dataclass(frozen=True, slots=True)
class _Use:
    """Hold one ``Depends``."""

    call: Any
    cached: bool
    scope: str | None


def draw(func: Call, *, where: str, bus_type: type, overrides: Overrides) -> Plan:
    """Return the plan of a handler under ``overrides``; ``where`` begins every sentence about it."""
    pen = _Pen(where, bus_type, overrides)
    shape = _shape_of(func)
    if inspect.isclass(func):
        pen.faults.append(f"{where}: a class cannot be a handler: register an instance with __call__, or a method")
    elif shape in ("asyncgen", "gen"):
        pen.faults.append(f"{where}: a generator cannot be a handler: say return instead of yield")
    call, places = pen.arguments(func, (), message=True)
    return Plan(
        handler=Node("", call, shape, (MESSAGE, *places)),
        nodes=tuple(pen.nodes),
        wanted=frozenset(pen.wanted),
        transactions=tuple(pen.transactions),
        overridden=tuple(pen.overridden),
        faults=tuple(dict.fromkeys(pen.faults)),
    )


def _shape_of(call: Call) -> Shape:
    """Return how a callable has to be called; as in FastAPI, what it wraps counts if it says nothing itself."""
    for layer in layers(call):
        if inspect.isasyncgenfunction(layer):
            return "asyncgen"
        if inspect.isgeneratorfunction(layer):
            return "gen"
        if inspect.iscoroutinefunction(layer):
            return "coroutine"
    return "thread"


def _may_hold_scopes(call: Call) -> bool:
    for layer in layers(call):
        code = getattr(layer, "__code__", None)
        if isinstance(code, CodeType) and (
            _ENTERS.intersection(code.co_names)
            or any(step.opname == "WITH_EXCEPT_START" for step in dis.get_instructions(code))
        ):
            return True
    return False


def _by_name(call: Call, names: tuple[str, ...]) -> Call:
    """Return ``call`` as one whose last arguments, although it wants them by name, are passed by position."""
    count = len(names)
    return lambda *values: call(*values[:-count], **dict(zip(names, values[-count:], strict=True)))


def _name(call: Any) -> str:
    if isinstance(call, functools.partial):
        return _name(call.func)
    name = getattr(call, "__name__", None)
    return name if isinstance(name, str) else type(call).__name__


class _Pen:
    """Draw one plan: every dependency once, below those it needs."""

    def __init__(self, where: str, bus_type: type, overrides: Overrides) -> None:
        self.where = where
        self.bus_type = bus_type
        self.overrides = overrides
        self.nodes: list[Node] = []
        self.wanted: set[int] = set()
        self.transactions: list[Any] = []
        self.overridden: list[tuple[Call, Call | None]] = []
        self.faults: list[str] = []
        self._drawn: dict[tuple[Call, str], int] = {}

    def arguments(self, call: Call, path: tuple[Call, ...], *, message: bool = False) -> tuple[Call, tuple[int, ...]]:
        """Return ``call`` as one to be called by position, and the places of its arguments."""
        try:
            parameters = list(inspect.signature(call).parameters.values())
        except (TypeError, ValueError) as error:
            if path:
                self._fault(path, f"its signature cannot be read ({error}): wrap it in a function")
            return call, ()
        prebound: Any = getattr(call, "keywords", ()) if type(call) is functools.partial else ()
        places: list[int] = []
        named: dict[str, int] = {}
        gap = False
        for parameter in parameters[message:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in prebound:
                continue
            try:
                place = self._place(parameter, call, path)
            except (_Unfit, UnresolvedError) as unfit:
                self._fault(path, f"parameter {parameter.name!r} {unfit}")
                continue
            if place is None:
                gap = True
            elif gap or parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = place
            else:
                places.append(place)
        return _by_name(call, tuple(named)) if named else call, (*places, *named.values())

    def _fault(self, path: tuple[Call, ...], sentence: str) -> None:
        below = f"dependency {' > '.join(map(_name, path))}: " if path else ""
        self.faults.append(f"{self.where}: {below}{sentence}")

    def _place(self, parameter: inspect.Parameter, call: Call, path: tuple[Call, ...]) -> int | None:
        """Return the place of the value for a parameter, or None if it is left to its default."""
        meaning, extras = _meaning(parameter, call, self.bus_type)
        use = _use(parameter, meaning, extras, call)
        offered = self._offered(meaning, call) if use is None or use.call.__module__ == _DOOR else None
        if offered is not None:
            return offered
        if use is not None:
            return self._node(use, path)
        if isinstance(meaning, type) and any(base.__name__ in _HTTP and _web(base) for base in meaning.__mro__):
            raise _Unfit(f"asks for {meaning.__name__}, and outside a request there is none: {_CURE}")
        if parameter.default is not parameter.empty:
            return None
        if path:
            raise _Unfit(f"would be read from the HTTP request, and outside a request there is none: {_CURE}")
        raise _Unfit(
            "is not one that the bus can fill: say Annotated[T, Depends(f)], Context, "
            f"{self.bus_type.__name__} or Transaction[S], or give it a default"
        )

    def _offered(self, meaning: Any, call: Call) -> int | None:
        place: int | None = None
        if meaning is Context:
            place = CONTEXT
        elif meaning is self.bus_type or (meaning is not object and meaning in self.bus_type.__mro__):
            place = BUS
        elif (get_origin(meaning) or meaning) is Transaction:
            place = TRANSACTION
            session: Any = resolved(get_args(meaning)[0], call) if get_args(meaning) else Any
            self.transactions.append(Any if isinstance(session, TypeVar) else session)
        if place is not None:
            self.wanted.add(place)
        return place

    def _node(self, use: _Use, path: tuple[Call, ...]) -> int:
        """Return the place of a dependency's value, drawing it first unless its value is shared."""
        override = self.overrides.get(use.call)
        self.overridden.append((use.call, override))
        call = use.call if override is None else override
        shape = _shape_of(call)
        scope = use.scope or ("request" if _shape_of(use.call) in ("asyncgen", "gen") else "")
        key = (use.call, scope)
        if use.cached and key in self._drawn:
            return self._drawn[key]
        if call in path:
            self._fault((*path, call), "goes round in a circle: let one of them take what it needs another way")
            return MESSAGE
        path = (*path, call)
        bound, places = self.arguments(call, path)
        if shape == "thread" and isinstance(call, _CACHED) and not places:
            shape = "cached"
        opens = shape in ("asyncgen", "gen")
        for fault in _call_faults(call, shape):
            self._fault(path, fault)
        if opens and scope != "function" and self._outlives(places):
            self._fault(
                path,
                'is closed after the handling, so it cannot depend on one of scope="function": '
                'say Depends(..., scope="function") for it as well',
            )
        scopes = shape == "asyncgen" and _may_hold_scopes(call)
        self.nodes.append(Node(_name(call), bound, shape, places, scope == "function", scopes, opens))
        place = FIRST + len(self.nodes) - 1
        self._drawn.setdefault(key, place)
        return place

    def _outlives(self, places: tuple[int, ...]) -> bool:
        """Tell whether one of the values is closed before the handling is over."""
        below = [self.nodes[place - FIRST] for place in places if place >= FIRST]
        return any(node.function or self._outlives(node.places) for node in below)


def _call_faults(call: Call, shape: Shape) -> Iterator[str]:
    made_of = list(layers(call))
    if any(isinstance(layer, _CACHED) for layer in made_of) and shape not in ("thread", "cached"):
        yield "is an async def or a generator in a cache, whose result can be used once only: take the cache off"
    if any(inspect.isfunction(layer) and layer.__globals__.get("__name__") == "contextlib" for layer in made_of):
        yield "is a context manager: take the decorator off, a bare generator is what Depends wants"


def _marks(marker: object) -> set[str]:
    return {cls.__name__ for cls in type(marker).__mro__ if cls.__module__ == "fastapi.params"}


def _web(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("fastapi", "starlette")


def _use(parameter: inspect.Parameter, meaning: Any, extras: tuple[Any, ...], call: Call) -> _Use | None:
    """Return the ``Depends`` of a parameter, if it has one. Raises ``_Unfit`` for FastAPI's other markers."""
    by_default = [parameter.default] if _marks(parameter.default) else []
    markers = [extra for extra in extras if _marks(extra)][-1:]
    if by_default and markers:
        raise _Unfit("has a marker in Annotated and another as its default: keep one")
    for marker in (*markers, *by_default):
        if "Depends" not in _marks(marker):
            raise _Unfit(f"asks for {type(marker).__name__}(...), and outside a request there is none: {_CURE}")
        if "Security" in _marks(marker):
            raise _Unfit(f"asks for Security(...), which guards requests, and a message is none: {_CURE}")
        if getattr(marker, "max_concurrency", None) is not None:
            raise _Unfit("limits max_concurrency, which the bus does not count: say concurrency= on the handler")
        target = marker.dependency
        if target is None:
            target = resolved(meaning, call)
        if not callable(target) or not isinstance(target, Hashable) or target is parameter.empty:
            raise _Unfit(f"depends on {target!r}: say Depends(f) with something that can be called and has a hash")
        return _Use(target, marker.use_cache, getattr(marker, "scope", None))
    return None


def _meaning(parameter: inspect.Parameter, call: Call, bus_type: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type that a parameter asks for, without Annotated, alias and ``| None``, and what was annotated."""
    annotation = parameter.annotation
    if isinstance(annotation, str):
        if "Depends" in _marks(parameter.default) and parameter.default.dependency is not None:
            return annotation, ()  # what the dependency returns: nobody has to know
        try:
            annotation = resolved(annotation, call)
        except UnresolvedError:
            if annotation.strip("'\"").rpartition(".")[2] != bus_type.__name__:
                raise
            annotation = bus_type  # our own type, which files import for type checkers only to break a circle
    extras: tuple[Any, ...] = ()
    while True:
        members: list[Any] = [arg for arg in get_args(annotation) if arg is not type(None)]
        if type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        elif get_origin(annotation) is Annotated:
            extras = (*extras, *annotation.__metadata__)
            annotation = annotation.__origin__
        elif get_origin(annotation) in (Union, UnionType) and len(members) == 1:
            annotation = members[0]
        elif isinstance(annotation, ForwardRef) and not any(map(_marks, extras)):
            annotation = resolved(annotation, call)
        else:
            return annotation, extras
