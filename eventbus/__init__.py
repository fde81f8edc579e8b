"""A typed in-process event bus for FastAPI whose handlers move to a broker by editing data."""

from eventbus.bus import EventBus
from eventbus.context import Context
from eventbus.dispatch import Receipt
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
from eventbus.limits import Limits
from eventbus.live import Gap
from eventbus.message import Command, Event, message
from eventbus.module import Module
from eventbus.retry import Retry
from eventbus.store import DeadEntry, Transaction

__all__ = (
    "AlreadyRunningError",
    "CircleError",
    "Command",
    "ConfigurationError",
    "Context",
    "DeadEntry",
    "DecodeError",
    "EncodeError",
    "Event",
    "EventBus",
    "EventBusError",
    "Gap",
    "HandlerTimeoutError",
    "Limits",
    "Lost",
    "MissingExtraError",
    "Module",
    "NoHandlerError",
    "NoTransactionError",
    "NotRunningError",
    "PublishError",
    "QueueFullError",
    "Receipt",
    "Refused",
    "Reject",
    "Retry",
    "RetryLater",
    "SettleError",
    "SlowConsumerError",
    "StoreError",
    "StoreFullError",
    "Transaction",
    "TransactionClosedError",
    "TransactionOpenError",
    "TransportError",
    "UnknownMessageError",
    "WiringError",
    "WrongLoopError",
    "message",
)
