"""Everything that is registered, checked as a whole and frozen: which message goes to whom, and where."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from inspect import getattr_static
from typing import Any

from pydantic import BaseModel

from eventbus.errors import UnknownMessageError, WiringError
from eventbus.handler import Handler, accepts, returned_messages, shown, signature_faults
from eventbus.inject import Injected, inject
from eventbus.message import Command, Event, MessageSpec, is_command, spec_of
from eventbus.middleware import Middleware
from eventbus.module import Module
from eventbus.routes import INLINE, MEMORY, RESERVED, STORE, Route
from eventbus.wiring import Wiring

__all__ = ("Known", "Registry", "Subject", "compile_wiring")


@dataclass(frozen=True, slots=True)
class Known:
    """Hold one handler with what its inspection found."""

    handler: Handler
    injected: Injected
    middleware: tuple[Middleware, ...]
    returns: tuple[type, ...]
    """The registered messages among what it may return: they are published with its success."""
    timeout: float | None
    """Seconds that one attempt may take, said or by default."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Hold one message type with everybody who is concerned by it."""

    type: type
    spec: MessageSpec
    command: bool
    route: Route
    inline: tuple[Known, ...]
    """Handled in the publisher's task."""
    routed: tuple[Known, ...]
    """Handled from the first transport of the route."""

    @property
    def source(self) -> str | None:
        """Return the transport that its routed handlers take it from."""
        first = self.route.transports[0]
        return None if first == INLINE else first

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the transports it is given to when it is published."""
        return tuple(one for one in self.route.transports if one != INLINE)


@dataclass(frozen=True, slots=True)
class Registry:
    """Hold the compiled wiring; nothing in it changes any more."""

    wiring: Wiring
    known: tuple[Known, ...]
    subjects: Mapping[type, Subject]
    names: Mapping[str, type]

    def subject(self, message: type) -> Subject:
        """Return who is concerned by a message type, also by one that was never registered."""
        found = self.subjects.get(message)
        return found if found is not None else _subject(self.wiring, self.known, message)

    def type_of(self, name: str, version: int = 1) -> type:
        """Return the type behind a wire name. Raises ``UnknownMessageError``."""
        found = self.names.get(name)
        if found is None:
            raise UnknownMessageError(name)
        if version > (known := spec_of(found).version):
            raise UnknownMessageError(name, version, known)
        return found

    def called(self, name: str) -> type:
        """Return the type of a wire name or, where only one has it, of a class name. Raises ``UnknownMessageError``."""
        same = [type_ for type_ in self.subjects if type_.__name__ == name]
        return same[0] if len(same) == 1 and name not in self.names else self.type_of(name)

    def queue(self, handler: Handler) -> str:
        """Return what a handler is called in stores and queues."""
        return f"{self.owner}/{handler.name}"

    @property
    def owner(self) -> str:
        """Return who we are in stores, queues and envelopes."""
        return self.wiring.name or "bus"

    @property
    def leaves(self) -> bool:
        """Tell whether any message has a route, so that correlation must follow everywhere."""
        return any(subject.targets for subject in self.subjects.values())


def compile_wiring(wiring: Wiring) -> Registry:
    """Return the frozen registry, and freeze its modules. Raises one ``WiringError`` with everything that is wrong."""
    faults: list[str] = []
    failed: list[Exception] = []
    for module in wiring.modules:
        faults.extend(_imports(module, failed))
    known: list[Known] = []
    for module in wiring.modules:
        for handler in module.handlers:
            faults.extend(signature_faults(handler))
            where = f"handler {handler.name}"
            injected = inject(handler.func, where=where, bus_type=wiring.bus_type, overrides=wiring.overrides)
            faults.extend(injected.faults)
            around = (*wiring.middleware, *module.middleware)
            known.append(Known(handler, injected, around, (), _timeout(wiring, handler, injected)))
    types = _types(wiring, known)
    known = [_with_returns(one, types) for one in known]
    faults.extend(_names(wiring, types, known))
    faults.extend(wiring.routes.faults({type_: spec_of(type_).name for type_ in types}, wiring.transports))
    subjects = {type_: subject for type_ in types if (subject := _untied(wiring, known, type_)) is not None}
    for subject in subjects.values():
        faults.extend(_subject_faults(wiring, subject))
    faults.extend(_live_faults(wiring, subjects.values()))
    for one in known:
        faults.extend(_handler_faults(wiring, one, subjects))
    if faults:
        raise WiringError(list(dict.fromkeys(faults))) from next(iter(failed), None)
    for module in wiring.modules:
        module.freeze()
    return Registry(wiring, tuple(known), subjects, {subject.spec.name: type_ for type_, subject in subjects.items()})


def _imports(module: Module, failed: list[Exception]) -> Iterator[str]:
    for path in module.imports:
        try:
            import_module(path)
        except Exception as error:
            failed.append(error)
            yield f"module {module.name!r}: importing {path!r} failed: {type(error).__name__}: {error}"


def _types(wiring: Wiring, known: Sequence[Known]) -> list[type]:
    found: dict[type, None] = {}
    for one in known:
        found.update(dict.fromkeys(one.handler.types))
        found.update(dict.fromkeys(type_ for type_ in returned_messages(one.handler) if _is_spoken(type_)))
    for module in wiring.modules:
        found.update(dict.fromkeys(module.messages))
    bases = [type_ for type_ in wiring.routes.types if not any(issubclass(other, type_) for other in found)]
    found.update(dict.fromkeys(bases))
    return list(found)


def _with_returns(one: Known, types: Collection[type]) -> Known:
    returns = tuple(type_ for type_ in returned_messages(one.handler) if type_ in types)
    return replace(one, returns=returns)


def _timeout(wiring: Wiring, handler: Handler, injected: Injected) -> float | None:
    """Return the timeout of a handler; whoever may keep all other writers out has to end well within a lease."""
    said = handler.options.timeout
    bounded = injected.transactions and not injected.threaded and wiring.store is not None and wiring.store.exclusive
    return wiring.limits.lease / 3 if said is None and bounded else said


def _is_spoken(type_: type) -> bool:
    """Tell whether a class is a message by its base, so that nobody has to register it."""
    return issubclass(type_, (Command, Event)) and type_ not in (Command, Event)


def _names(wiring: Wiring, types: Sequence[type], known: Sequence[Known]) -> Iterator[str]:
    modules = [module.name for module in wiring.modules]
    for name in sorted({name for name in modules if modules.count(name) > 1}):
        yield f"two modules are called {name!r}: a module's name is the first part of its handlers' identity"
    by_name: dict[str, type] = {}
    for type_ in types:
        name = spec_of(type_).name
        other = by_name.setdefault(name, type_)
        if other is not type_:
            yield (
                f"{_path(other)} and {_path(type_)} are both called {name!r} on the wire: "
                "give one of them another name="
            )
    holders: dict[str, Handler] = {}
    for one in known:
        for name in (one.handler.name, *one.handler.options.aliases):
            holder = holders.setdefault(name, one.handler)
            if holder is not one.handler:
                yield (
                    f"two handlers answer to {name!r} ({holder.where} and {one.handler.where}): "
                    "a handler's name is its identity, say name='...' on one of them"
                )


def _untied(wiring: Wiring, known: Sequence[Known], message: type) -> Subject | None:
    """Return who is concerned by a message type, or None if its routes are tied, which is a fault of theirs."""
    try:
        return _subject(wiring, known, message)
    except WiringError:
        return None


def _subject(wiring: Wiring, known: Sequence[Known], message: type) -> Subject:
    spec = spec_of(message)
    route = wiring.routes.resolve(message, spec.name)
    concerned = _concerned(known, message)
    here = route.transports[0] == INLINE
    inline = tuple(one for one in concerned if here or one.handler.options.inline)
    routed = tuple(one for one in concerned if not here and not one.handler.options.inline)
    return Subject(message, spec, is_command(message), route, inline, routed)


def _concerned(known: Sequence[Known], message: type) -> list[Known]:
    """Return the handlers of an event and of its bases, or of a command, else of the nearest command above it."""
    able = [one for one in known if one.handler.is_command_handler == is_command(message)]
    if not is_command(message):
        return [one for one in able if issubclass(message, one.handler.types)]
    for type_ in message.__mro__:
        if found := [one for one in able if type_ in one.handler.types]:
            return found
    return []


def _subject_faults(wiring: Wiring, subject: Subject) -> Iterator[str]:
    name, spec, targets = subject.type.__name__, subject.spec, subject.targets
    if spec.key is not None and not _has_field(subject.type, spec.key):
        yield f"message {name}: key={spec.key!r} is not one of its fields"
    if subject.command:
        handlers = [one.handler for one in (*subject.inline, *subject.routed)]
        if len(handlers) > 1:
            places = ", ".join(f"{one.name} ({one.where})" for one in handlers)
            many = f"command {name} has {len(handlers)} handlers, and a command has exactly one"
            yield f"{many}: {places}; keep one or make it an event"
        if not handlers and not any(target not in RESERVED for target in targets):
            yield f"command {name} has no handler: decorate one with @module.handles({name}), or route it to a broker"
    if INLINE in subject.route.transports[1:]:
        yield f"{subject.route.rule}: 'inline' must come first; a handler has one source, the first of the route"
    if STORE in targets and wiring.store is None:
        yield f"{subject.route.rule} goes to 'store', but the bus has none: EventBus(store=...)"
    if wiring.name is None and any(target != MEMORY for target in targets):
        yield f"{subject.route.rule} leaves the process, so the bus needs a name: EventBus(..., name='shop')"
    if targets and (fault := wiring.codec.prepare(subject.type)) is not None:
        yield f"message {name} is routed, but its body cannot travel: {fault}"


def _handler_faults(wiring: Wiring, one: Known, subjects: Mapping[type, Subject]) -> Iterator[str]:
    handler, options = one.handler, one.handler.options
    if one.injected.threaded and options.timeout is not None:
        yield (
            f"handler {handler.name}: timeout= cannot be kept for a plain def, whose thread goes on: "
            "make it async, or put the limit into the blocking call"
        )
    if one.injected.transactions and wiring.store is None:
        yield f"handler {handler.name} takes a Transaction, but the bus has no store: EventBus(store='sqlite:///shop.db')"
    elif wiring.store is not None:
        sessions = wiring.store.sessions
        for wanted in one.injected.transactions:
            if not any(accepts(wanted, session) for session in sessions):
                given = " or ".join(map(shown, sessions))
                yield f"handler {handler.name} takes Transaction[{shown(wanted)}], but the store's session is {given}"
        longest = wiring.limits.lease / 3
        if one.injected.transactions and wiring.store.exclusive and (options.timeout or 0.0) > longest:
            yield (
                f"handler {handler.name}: timeout={options.timeout:g} is more than a third of the lease "
                f"({longest:g} s), and its transaction keeps all other writers out: lower it or raise Limits(lease=...)"
            )
    for returned in one.returns:
        if is_command(returned) and returned in subjects and not subjects[returned].targets:
            yield f"handler {handler.name} returns the command {returned.__name__} for later, and it has no route"
    for subject in subjects.values():
        if one in subject.routed:
            yield from _promise_faults(wiring, one, subject)


def _promise_faults(wiring: Wiring, one: Known, subject: Subject) -> Iterator[str]:
    handler, options, source = one.handler, one.handler.options, subject.source
    transport = wiring.transports.get(source or INLINE)
    if transport is None:
        return
    where = f"handler {handler.name} takes {subject.spec.name!r} from {source!r}"
    promises = transport.capabilities
    if options.ordered and promises.order == "none":
        yield f"{where}, which keeps no order, and it is ordered=True: route it to another transport"
    if not promises.groups:
        yield f"{where}, which has no consumer groups: route it to another transport"
    if wiring.store is not None and source != MEMORY:
        return
    if options.on_dead == "block":
        yield f'{where}, which cannot keep on_dead="block": that needs a store'
    if source == MEMORY:
        return
    if not promises.attempts:
        yield f"{where}, which counts no attempts, so a message that kills its process would come for ever: use a store"


def _live_faults(wiring: Wiring, subjects: Collection[Subject]) -> Iterator[str]:
    live = wiring.live
    if live is None:
        return
    transport = wiring.transports.get(live)
    if live == STORE:
        yield "live='store': a store gives a message to one process, and streams are open in all: name a transport"
    elif live in RESERVED:
        yield f"live={live!r} never leaves this process: leave live= out, or name one of transports={{...}}"
    elif transport is None:
        yield f"live={live!r} is no transport of this bus: name one of transports={{...}}"
    elif not transport.capabilities.broadcast:
        yield f"live={live!r} gives a message to one process, and streams are open in all: name one that broadcasts"
    if wiring.name is None:
        yield f"live={live!r} leaves the process, so the bus needs a name: EventBus(..., name='shop')"
    for subject in subjects:
        if not subject.command and not subject.targets and (fault := wiring.codec.prepare(subject.type)) is not None:
            yield f"event {subject.type.__name__} goes out through live={live!r}, but its body cannot travel: {fault}"


def _has_field(type_: type[Any], name: str) -> bool:
    named = type_.model_fields if issubclass(type_, BaseModel) else getattr(type_, "__dataclass_fields__", {})
    return name in named or isinstance(getattr_static(type_, name, None), property | cached_property)


def _path(type_: type) -> str:
    return f"{type_.__module__}.{type_.__qualname__}"
