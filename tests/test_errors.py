"""Errors: each takes facts, writes a sentence that says the next step, and survives pickling and copying."""

import copy
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest

import eventbus
from eventbus import errors
from eventbus.errors import (
    AlreadyRunningError,
    CircleError,
    ConfigurationError,
    DecodeError,
    EncodeError,
    EventBusError,
    HandlerTimeoutError,
    Lost,
    MissingExtraError,
    NoHandlerError,
    NoTransactionError,
    NotRunningError,
    PublishError,
    QueueFullError,
    Refused,
    Reject,
    RetryLater,
    SettleError,
    SlowConsumerError,
    StoreError,
    StoreFullError,
    TransactionClosedError,
    TransactionOpenError,
    TransportError,
    UnknownMessageError,
    WiringError,
    WrongLoopError,
)

CASES: dict[str, tuple[Callable[[], EventBusError], dict[str, Any], str]] = {
    "EventBusError": (lambda: EventBusError("no", 7), {}, "no 7"),
    "WiringError": (
        lambda: WiringError(["one is missing", "two are tied"]),
        {"faults": ("one is missing", "two are tied")},
        "2 faults in the wiring:\n  - one is missing\n  - two are tied",
    ),
    "WiringError of one": (
        lambda: WiringError(["one is missing"]),
        {"faults": ("one is missing",)},
        "1 fault in the wiring:\n  - one is missing",
    ),
    "ConfigurationError": (
        lambda: ConfigurationError(["bus.toml:1: store: is empty"]),
        {"faults": ("bus.toml:1: store: is empty",)},
        "1 fault in the configuration:\n  - bus.toml:1: store: is empty",
    ),
    "NoHandlerError": (
        lambda: NoHandlerError("shop.place"),
        {"message": "shop.place"},
        (
            "no handler for command 'shop.place' in this process: decorate one with @module.handles(...), pass its "
            "module to EventBus(...) and import the file it lives in (Module(imports=[...]) does it for you)"
        ),
    ),
    "NotRunningError": (
        lambda: NotRunningError("bus.stream()"),
        {"operation": "bus.stream()", "state": "not started"},
        (
            "bus.stream() needs a running bus, and this one is not started: use `async with bus.running():`, "
            "install(app, bus) (of a mounted application, on the outer one as well), or in tests "
            "`with TestClient(app)` or harness(bus)"
        ),
    ),
    "AlreadyRunningError": (
        lambda: AlreadyRunningError("harness(bus)"),
        {"operation": "harness(bus)"},
        (
            "harness(bus) needs a bus that is not running, and this one runs already: leave its lifetime, or its "
            "harness, first; where install(app, bus) has started it, use it as it is"
        ),
    ),
    "CircleError": (
        lambda: CircleError("shop.placed", 51),
        {"message": "shop.placed", "depth": 51},
        (
            "shop.placed would be number 51 of messages handled each inside the one before: do their handlers send or "
            "publish in a circle? Give one of them a route"
        ),
    ),
    "WrongLoopError": (
        lambda: WrongLoopError("bus.dead", "another event loop"),
        {"operation": "bus.dead", "where": "another event loop"},
        (
            "bus.dead was called from another event loop, but the bus runs elsewhere: call it where `bus.running()` "
            "was entered (from a thread: anyio.from_thread.run), and start a bus of its own in each process after the "
            "fork"
        ),
    ),
    "NoTransactionError": (
        lambda: NoTransactionError("shop.placed", "store"),
        {"message": "shop.placed", "destination": "store"},
        (
            "'shop.placed' goes to 'store', which is durable, and no transaction is open: publish inside "
            "`async with bus.transaction():` (or in a handler that takes Transaction), or say atomic=False to store it "
            "in a transaction of its own"
        ),
    ),
    "TransactionClosedError": (
        lambda: TransactionClosedError("publishing"),
        {"operation": "publishing"},
        (
            "publishing in a transaction that is over: do it before the `async with bus.transaction()` block ends, and "
            "open a transaction of its own in a task that outlives it"
        ),
    ),
    "TransactionOpenError": (
        lambda: TransactionOpenError("bus.dead.replay()"),
        {"operation": "bus.dead.replay()"},
        (
            "bus.dead.replay() in an open transaction would wait for itself, since this store has one writer at a "
            "time: call it before the transaction, or after it"
        ),
    ),
    "QueueFullError": (
        lambda: QueueFullError("shop.placed@shop.ship", 5, "its own handler would wait"),
        {"queue": "shop.placed@shop.ship", "size": 5, "reason": "its own handler would wait"},
        (
            "queue 'shop.placed@shop.ship' holds its maximum of 5 messages and its own handler would wait: publish "
            "fewer, raise Limits(queue=...), or route the message to a store"
        ),
    ),
    "HandlerTimeoutError": (
        lambda: HandlerTimeoutError("shop.ship", 2.5),
        {"handler": "shop.ship", "seconds": 2.5},
        "handler 'shop.ship' did not finish within its timeout of 2.5 s: let it do less, or raise its timeout=",
    ),
    "EncodeError": (
        lambda: EncodeError("shop.placed", "a number in it is not finite"),
        {"message": "shop.placed", "reason": "a number in it is not finite"},
        "'shop.placed' cannot travel: a number in it is not finite",
    ),
    "DecodeError": (lambda: DecodeError("it is no JSON"), {"reason": "it is no JSON"}, "it is no JSON"),
    "UnknownMessageError": (
        lambda: UnknownMessageError("shop.placed"),
        {"name": "shop.placed", "version": None, "known": None},
        "no message is registered under the name 'shop.placed': import the module that declares it",
    ),
    "UnknownMessageError of a version": (
        lambda: UnknownMessageError("shop.placed", 3, 2),
        {"name": "shop.placed", "version": 3, "known": 2},
        (
            "'shop.placed' arrived in version 3, newer than version 2 that this process knows: "
            "deploy the newer version here"
        ),
    ),
    "SlowConsumerError": (
        lambda: SlowConsumerError("Placed", 100),
        {"event": "Placed", "buffer": 100},
        (
            "the reader of stream(Placed) fell more than 100 events behind and was disconnected: reconnect, read "
            'faster, or use slow="drop" to be told of gaps instead'
        ),
    ),
    "MissingExtraError": (
        lambda: MissingExtraError("eventbus.transports.redis", "redis"),
        {"what": "eventbus.transports.redis", "extra": "redis"},
        "eventbus.transports.redis needs an optional library: pip install 'eventbus[redis]'",
    ),
    "StoreError": (lambda: StoreError("the disk failed"), {}, "the disk failed"),
    "StoreFullError": (lambda: StoreFullError("the disk is full"), {}, "the disk is full"),
    "TransportError": (lambda: TransportError("no link"), {}, "no link"),
    "Lost": (lambda: Lost("the broker is away"), {}, "the broker is away"),
    "Refused": (lambda: Refused("too large"), {}, "too large"),
    "SettleError": (lambda: SettleError("the lease is over"), {}, "the lease is over"),
    "PublishError": (
        lambda: PublishError({3: Lost("away"), 1: Refused("too large")}),
        {},
        "2 message(s) not published; number 1: too large",
    ),
    "Reject": (lambda: Reject("card stolen"), {"reason": "card stolen"}, "card stolen"),
    "Reject without a reason": (Reject, {"reason": "rejected by the handler"}, "rejected by the handler"),
    "RetryLater": (lambda: RetryLater(90), {"seconds": 90}, "again in 90 s"),
}

FAMILY: dict[type[EventBusError], tuple[type[BaseException], ...]] = {
    UnknownMessageError: (DecodeError,),
    StoreFullError: (StoreError,),
    Lost: (TransportError,),
    Refused: (TransportError,),
    SettleError: (TransportError,),
    PublishError: (TransportError,),
    AlreadyRunningError: (RuntimeError,),
    CircleError: (RecursionError,),
    HandlerTimeoutError: (TimeoutError,),
    MissingExtraError: (ImportError,),
}


def facts(error: BaseException) -> dict[str, Any]:
    """Return what an error says besides its class, comparable."""
    return {name: repr(value) for name, value in vars(error).items() if name != "__notes__"}


def test_every_error_has_a_case() -> None:
    """No error of the module is forgotten here."""
    assert set(errors.__all__) == {type(make()).__name__ for make, _, _ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_facts(case: str) -> None:
    """An error keeps its facts as attributes."""
    make, expected, _ = CASES[case]
    error = make()
    assert expected == {name: getattr(error, name) for name in expected}


@pytest.mark.parametrize("case", CASES)
def test_sentence(case: str) -> None:
    """An error's text is its sentence, with the next step where the user can take one."""
    make, _, sentence = CASES[case]
    assert sentence == str(make())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "through", [*(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(6)), copy.copy, copy.deepcopy],
    ids=[*(f"pickle {p}" for p in range(6)), "copy", "deepcopy"],
)  # fmt: skip
def test_copies(case: str, through: Callable[[Any], Any]) -> None:
    """An error comes out of a pickle or a copy with its class, facts, sentence and notes."""
    make, _, sentence = CASES[case]
    error = make()
    error.add_note("in handler shop.ship")
    copied = through(error)
    assert (type(error), sentence, facts(error)) == (type(copied), str(copied), facts(copied))
    assert ["in handler shop.ship"] == copied.__notes__
    assert repr(error) == repr(copied)


@pytest.mark.parametrize("name", errors.__all__)
def test_family(name: str) -> None:
    """Every error is one of ours, and some are also what Python calls them."""
    kind = getattr(errors, name)
    assert issubclass(kind, EventBusError)
    assert (kind.__doc__ or "").strip()
    for base in FAMILY.get(kind, ()):
        assert issubclass(kind, base)
    assert kind is getattr(eventbus, name)


def test_tree_in_the_documentation() -> None:
    """The tree in the module's documentation names every error once."""
    tree = (errors.__doc__ or "").split("\n\n")[1]
    assert sorted(errors.__all__) == sorted(line.strip(" │├└─").split(" ")[0] for line in tree.splitlines())


def test_wiring_errors_in_a_traceback() -> None:
    """A traceback shows every fault on a line of its own."""
    text = "".join(traceback.format_exception_only(WiringError(["one", "two"])))
    assert "eventbus.errors.WiringError: 2 faults in the wiring:\n  - one\n  - two\n" == text


def test_timeout_error_is_caught_as_such() -> None:
    """Code that knows nothing of us catches a handler's timeout as a TimeoutError, without an errno."""
    with pytest.raises(TimeoutError) as caught:
        raise HandlerTimeoutError("shop.ship", 3)
    assert "within its timeout of 3 s" in str(caught.value)


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan")])
def test_retry_later_takes_seconds(seconds: float) -> None:
    """A delay that never ends, or lies in the past, is refused where it is raised."""
    with pytest.raises(ValueError, match="RetryLater takes the seconds to wait, 0 or more, not"):
        raise RetryLater(seconds)


def test_publish_error_keeps_a_copy() -> None:
    """Which messages failed cannot be changed from outside."""
    failed: dict[int, Any] = {0: Lost("away")}
    error = PublishError(failed)
    failed.clear()
    assert [0] == list(error.failed)
