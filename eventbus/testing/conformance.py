"""Examine a transport or a store that somebody else wrote: plain functions over a port and what it declares.

A transport is examined by ``examine_transport(bench, check)`` for each of ``transport_checks(capabilities)``: what it
declares and does not keep raises ``AssertionError``. A store is examined by ``examine_store(check, make)`` for each of
``STORE_CHECKS``; it is made with ``limits=STORE_LIMITS``, keeps nothing yet and is not open.

>>> import anyio
>>> from eventbus.stores.memory import MemoryStore
>>> from eventbus.transports.memory import MemoryTransport
>>> bench = TransportBench(make=MemoryTransport)
>>> checks = transport_checks(MemoryTransport().capabilities)
>>> print(checks[0])
01 Deliver every body byte for byte.
>>> anyio.run(examine_transport, bench, checks[0])
>>> anyio.run(examine_store, STORE_CHECKS[0], lambda: MemoryStore(limits=STORE_LIMITS))

Each check is a question of its own, so a parametrised test shows which one failed; ``str(check)`` is its name.
"""

from eventbus.testing.store_exam import CHECKS as STORE_CHECKS
from eventbus.testing.store_exam import LIMITS as STORE_LIMITS
from eventbus.testing.store_exam import Check as StoreCheck
from eventbus.testing.store_exam import HandClock
from eventbus.testing.store_exam import examine as examine_store
from eventbus.testing.transport_exam import CHECKS as TRANSPORT_CHECKS
from eventbus.testing.transport_exam import Bench as TransportBench
from eventbus.testing.transport_exam import Check as TransportCheck
from eventbus.testing.transport_exam import checks_for as transport_checks
from eventbus.testing.transport_exam import examine as examine_transport

__all__ = (
    "STORE_CHECKS",
    "STORE_LIMITS",
    "TRANSPORT_CHECKS",
    "HandClock",
    "StoreCheck",
    "TransportBench",
    "TransportCheck",
    "examine_store",
    "examine_transport",
    "transport_checks",
)
