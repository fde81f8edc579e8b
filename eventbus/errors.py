"""The whole error family.

    EventBusError
    ├── WiringError               everything wrong with the wiring, found at start-up
    │   └── ConfigurationError    everything wrong with a configuration file
    ├── NoHandlerError            a command that nobody handles here
    ├── NotRunningError           something needs a running bus
    ├── AlreadyRunningError       something needs a bus that is not running (also a RuntimeError)
    ├── WrongLoopError            the bus belongs to another event loop, thread or process
    ├── NoTransactionError        a durable publish outside a transaction
    ├── TransactionClosedError    a publish in a transaction that is over
    ├── TransactionOpenError      what would wait for the open transaction
    ├── QueueFullError            waiting for room would never end
    ├── CircleError               messages that cause each other for ever (also a RecursionError)
    ├── HandlerTimeoutError       a handler took longer than its timeout (also a TimeoutError)
    ├── EncodeError               a message that cannot travel
    ├── DecodeError               bytes that are no message of ours
    │   └── UnknownMessageError   a name or version that nobody here knows (yet)
    ├── SlowConsumerError         a live stream whose reader fell behind
    ├── MissingExtraError         an optional library is not installed (also an ImportError)
    ├── StoreError                the store failed
    │   └── StoreFullError        the store refuses new entries
    ├── TransportError            the link to a broker
    │   ├── Lost                  try later, the outcome may be unknown
    │   ├── Refused               this message never; or we are not let in
    │   ├── SettleError           the right to settle is gone
    │   └── PublishError          some messages of one call failed
    ├── Reject                    raised by a handler: dead now
    └── RetryLater                raised by a handler: again then

Every error takes facts, writes its own sentence, and survives pickling.
"""

from collections.abc import Mapping, Sequence

__all__ = (
    "AlreadyRunningError",
    "CircleError",
    "ConfigurationError",
    "DecodeError",
    "EncodeError",
    "EventBusError",
    "HandlerTimeoutError",
    "Lost",
    "MissingExtraError",
    "NoHandlerError",
    "NoTransactionError",
    "NotRunningError",
    "PublishError",
    "QueueFullError",
    "Refused",
    "Reject",
    "RetryLater",
    "SettleError",
    "SlowConsumerError",
    "StoreError",
    "StoreFullError",
    "TransactionClosedError",
    "TransactionOpenError",
    "TransportError",
    "UnknownMessageError",
    "WiringError",
    "WrongLoopError",
)


class EventBusError(Exception):
    """Be the root of every error that eventbus raises.

    The arguments of each error are its facts: they are kept as attributes, and ``str()`` writes the sentence.
    """

    def __str__(self) -> str:
        return " ".join(str(fact) for fact in self.args)


class WiringError(EventBusError):
    """Say everything that is wrong with the wiring, at once; ``faults`` has one sentence each."""

    _place = "wiring"

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(tuple(faults))
        self.faults = tuple(faults)

    def __str__(self) -> str:
        count = len(self.faults)
        head = f"{count} fault{'s' * (count != 1)} in the {self._place}:"
        return "\n".join([head, *(f"  - {fault}" for fault in self.faults)])


class ConfigurationError(WiringError):
    """Say everything that is wrong with a configuration file, at once; each fault names the file and the line."""

    _place = "configuration"


class NoHandlerError(EventBusError):
    """Say that no handler in this process takes the command."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return (
            f"no handler for command {self.message!r} in this process: decorate one with @module.handles(...), "
            "pass its module to EventBus(...) and import the file it lives in (Module(imports=[...]) does it for you)"
        )


class NotRunningError(EventBusError):
    """Say that an operation needs a running bus."""

    def __init__(self, operation: str, state: str = "not started") -> None:
        super().__init__(operation, state)
        self.operation = operation
        self.state = state

    def __str__(self) -> str:
        return (
            f"{self.operation} needs a running bus, and this one is {self.state}: use `async with bus.running():`, "
            "install(app, bus) (of a mounted application, on the outer one as well), or in tests "
            "`with TestClient(app)` or harness(bus)"
        )


class AlreadyRunningError(EventBusError, RuntimeError):
    """Say that an operation needs a bus that is not running."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation = operation

    def __str__(self) -> str:
        return (
            f"{self.operation} needs a bus that is not running, and this one runs already: leave its lifetime, or its "
            "harness, first; where install(app, bus) has started it, use it as it is"
        )


class WrongLoopError(EventBusError):
    """Say that the bus runs in another event loop, thread or process."""

    def __init__(self, operation: str, where: str) -> None:
        super().__init__(operation, where)
        self.operation = operation
        self.where = where

    def __str__(self) -> str:
        return (
            f"{self.operation} was called from {self.where}, but the bus runs elsewhere: "
            "call it where `bus.running()` was entered (from a thread: anyio.from_thread.run), "
            "and start a bus of its own in each process after the fork"
        )


class NoTransactionError(EventBusError):
    """Say that a durable publish would be a silent dual write."""

    def __init__(self, message: str, destination: str) -> None:
        super().__init__(message, destination)
        self.message = message
        self.destination = destination

    def __str__(self) -> str:
        return (
            f"{self.message!r} goes to {self.destination!r}, which is durable, and no transaction is open: "
            "publish inside `async with bus.transaction():` (or in a handler that takes Transaction), "
            "or say atomic=False to store it in a transaction of its own"
        )


class TransactionClosedError(EventBusError):
    """Say that the transaction is over, so nothing can be added to it."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation = operation

    def __str__(self) -> str:
        return (
            f"{self.operation} in a transaction that is over: do it before the `async with bus.transaction()` block "
            "ends, and open a transaction of its own in a task that outlives it"
        )


class TransactionOpenError(EventBusError):
    """Say that an operation would wait for the open transaction, which waits for it."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation = operation

    def __str__(self) -> str:
        return (
            f"{self.operation} in an open transaction would wait for itself, since this store has one writer at a "
            "time: call it before the transaction, or after it"
        )


class QueueFullError(EventBusError):
    """Say that a queue is full and that waiting for room would never end."""

    def __init__(self, queue: str, size: int, reason: str) -> None:
        super().__init__(queue, size, reason)
        self.queue = queue
        self.size = size
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"queue {self.queue!r} holds its maximum of {self.size} messages and {self.reason}: "
            "publish fewer, raise Limits(queue=...), or route the message to a store"
        )


class CircleError(EventBusError, RecursionError):
    """Say that messages are sent or published in a circle, each handled inside the one before."""

    def __init__(self, message: str, depth: int) -> None:
        super().__init__(message, depth)
        self.message = message
        self.depth = depth

    def __str__(self) -> str:
        return (
            f"{self.message} would be number {self.depth} of messages handled each inside the one before: "
            "do their handlers send or publish in a circle? Give one of them a route"
        )


class HandlerTimeoutError(EventBusError, TimeoutError):
    """Say that a handler did not finish within its timeout."""

    def __init__(self, handler: str, seconds: float) -> None:
        super().__init__(handler, seconds)
        self.handler = handler
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"handler {self.handler!r} did not finish within its timeout of {self.seconds:g} s: "
            "let it do less, or raise its timeout="
        )


class EncodeError(EventBusError):
    """Say why a message cannot be turned into what travels."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.message = message
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.message!r} cannot travel: {self.reason}"


class DecodeError(EventBusError):
    """Say why bytes from outside are no message of ours."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class UnknownMessageError(DecodeError):
    """Say that a message name or version is not registered here (yet)."""

    def __init__(self, name: str, version: int | None = None, known: int | None = None) -> None:
        reason = (
            f"no message is registered under the name {name!r}: import the module that declares it"
            if known is None
            else f"{name!r} arrived in version {version}, newer than version {known} that this process knows: "
            "deploy the newer version here"
        )
        super().__init__(reason)
        self.args = (name, version, known)
        self.name = name
        self.version = version
        self.known = known


class SlowConsumerError(EventBusError):
    """Say that a live stream was ended because its reader fell behind."""

    def __init__(self, event: str, buffer: int) -> None:
        super().__init__(event, buffer)
        self.event = event
        self.buffer = buffer

    def __str__(self) -> str:
        return (
            f"the reader of stream({self.event}) fell more than {self.buffer} events behind and was disconnected: "
            'reconnect, read faster, or use slow="drop" to be told of gaps instead'
        )


class MissingExtraError(EventBusError, ImportError):
    """Say which optional library is missing, with the line that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(what, extra)
        self.what = what
        self.extra = extra

    def __str__(self) -> str:
        return f"{self.what} needs an optional library: pip install 'eventbus[{self.extra}]'"


class StoreError(EventBusError):
    """Say that the store failed; nothing that it had confirmed is lost."""


class StoreFullError(StoreError):
    """Say that the store cannot take more (disk, quota or ceiling)."""


class TransportError(EventBusError):
    """Be the root of what can go wrong with a link to a broker."""


class Lost(TransportError):  # noqa: N818 - the port's word for it
    """Say that the link failed: try later, the outcome may be unknown."""


class Refused(TransportError):  # noqa: N818 - the port's word for it
    """Say that the broker will never take this message, or does not let us in."""


class SettleError(TransportError):
    """Say that the link or the lease is gone, so this delivery is somebody else's now."""


class PublishError(TransportError):
    """Say which messages of one publish call failed, and how.

    ``failed`` maps the index of each failed message to ``Lost`` or ``Refused``; all others are safe.
    """

    def __init__(self, failed: Mapping[int, "Lost | Refused"]) -> None:
        super().__init__(dict(failed))
        self.failed = dict(failed)

    def __str__(self) -> str:
        first = min(self.failed)
        return f"{len(self.failed)} message(s) not published; number {first}: {self.failed[first]}"


class Reject(EventBusError):  # noqa: N818 - an order to the worker, not a fault
    """Raise in a handler to give its message up at once: it is dead now, with the reason.

    >>> raise Reject("card stolen")  # doctest: +SKIP
    """

    def __init__(self, reason: str = "rejected by the handler") -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class RetryLater(EventBusError):  # noqa: N818 - an order to the worker, not a fault
    """Raise in a handler to have its message again after ``seconds``.

    It counts as an attempt, so a message that is postponed for ever ends among the dead.
    """

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"RetryLater takes the seconds to wait, 0 or more, not {seconds!r}")
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"again in {self.seconds:g} s"
