"""What the simulated processes do: messages, handlers that behave well or badly, and the mixes of a run."""

from contextvars import ContextVar
from dataclasses import dataclass
from random import Random
from typing import Any

import anyio

from eventbus import Command, Context, Event, EventBus, Limits, Module, Reject, Retry, RetryLater, Transaction
from eventbus.middleware import CallNext
from tests.simulation.database import Session
from tests.simulation.world import Process

__all__ = ("PROCESS", "SHAPES", "Charge", "Order", "Place", "Shape", "Shipped", "Traits", "draw", "observe", "quiet")

PROCESS: ContextVar[Process] = ContextVar("process")
NAME = "sim"
RETRY = Retry(attempts=4, initial=0.2, maximum=2.0)


class Order(Event, name="sim.order", key="key"):
    """Be what most runs are about."""

    key: str
    number: int


class Shipped(Event, name="sim.shipped", key="key"):
    """Follow from an order, in the same transaction as its handling."""

    key: str
    number: int


class Charge(Command[None], name="sim.charge", key="key"):
    """Be a command for later."""

    key: str
    number: int


class Place(Command[str], name="sim.place"):
    """Be a command for now, with a transaction of its own."""

    key: str
    number: int


class Oops(Exception):  # noqa: N818 - it is what the handlers say
    """Fail on purpose."""


books, desk, mail, line, track, till, door = map(Module, ("books", "desk", "mail", "line", "track", "till", "door"))


@books.on(Order, retry=RETRY)
async def book(event: Order, tx: Transaction[Session], ctx: Context, bus: EventBus) -> None:
    """Write with a transaction, and publish what follows."""
    await work(ctx, tx=tx)
    if PROCESS.get().world.traits.shape.ships:
        receipt = await bus.publish(Shipped(key=event.key, number=event.number))
        tx.session.write("order", receipt.id)


@desk.on(Order, ordered=True, retry=RETRY, timeout=4.0)
async def queue(event: Order, tx: Transaction[Session], ctx: Context) -> None:
    """Write with a transaction, in order."""
    await work(ctx, tx=tx, ordered=True)


@mail.on(Order, retry=RETRY)
async def letter(event: Order, ctx: Context) -> None:
    """Do something that no transaction can take back."""
    await work(ctx)


@line.on(Order, ordered=True, retry=RETRY, on_dead="block")
async def step(event: Order, ctx: Context) -> None:
    """Do something in order; what dies blocks."""
    await work(ctx, ordered=True)


@track.on(Shipped, ordered=True, retry=RETRY)
async def follow(event: Shipped, tx: Transaction[Session], ctx: Context) -> None:
    """Write with a transaction, in order, what came from another handler."""
    await work(ctx, tx=tx, ordered=True)


@till.handles(Charge, retry=RETRY)
async def charge(command: Charge, tx: Transaction[Session], ctx: Context) -> None:
    """Handle a command that was kept for later."""
    await work(ctx, tx=tx)


@door.handles(Place)
async def place(command: Place, tx: Transaction[Session], bus: EventBus) -> str:
    """Handle a command now, and publish in its transaction."""
    receipt = await bus.publish(Order(key=command.key, number=command.number))
    tx.session.write("order", receipt.id)
    return receipt.id


async def work(ctx: Context, *, tx: Transaction[Session] | None = None, ordered: bool = False) -> None:
    """Take a while, take effect, and fail as the traits of the run want it."""
    process = PROCESS.get()
    world, recipient = process.world, f"{NAME}/{ctx.handler}"
    chance, traits = world.random, world.traits
    world.oracle.started(process, ctx.message_id, recipient, ordered=ordered, transactional=tx is not None)
    try:
        bad = world.faulty and chance.random() < traits.failing
        long = bad and chance.random() < 0.2
        pause = traits.limits.lease * (0.5 + chance.random()) if long else chance.random() * traits.pause
        if pause > 0.01:
            await anyio.sleep(pause)
        await process.gate()
        if not process.alive:
            await anyio.sleep_forever()
        if tx is not None:
            tx.session.write(recipient, ctx.message_id)
        if bad and not long:
            raise chance.choice((Oops("boom"), Oops("bang"), Reject("no"), RetryLater(chance.random() * 3)))
    except anyio.get_cancelled_exc_class():
        if process.stopping.is_set() or process.scope.cancel_called:
            world.oracle.excuse(recipient)
        raise
    finally:
        world.oracle.ended(process, ctx.message_id, recipient)


async def observe(ctx: Context, call_next: CallNext) -> Any:
    """Count the failures that handlers are to blame for: not those of being cancelled."""
    try:
        return await call_next(ctx)
    except Exception:
        process = PROCESS.get()
        if anyio.current_effective_deadline() != float("-inf"):
            process.world.oracle.failed(process, ctx.message_id, f"{NAME}/{ctx.handler}")
        raise


@dataclass(frozen=True, eq=False)
class Shape:
    """Be one wiring."""

    modules: tuple[Module, ...]
    routes: dict[Any, Any]
    transactional: tuple[str, ...] = ()
    ordered: tuple[str, ...] = ()
    """Ordered handlers with a transaction, whose effects have to be committed in order."""
    blocking: tuple[str, ...] = ()
    ingested: tuple[str, ...] = ()
    """Who gets what comes in from the broker."""
    outward: tuple[str, ...] = ()
    """What only other services take from the broker."""
    ships: bool = False
    charges: bool = False


BOOK, QUEUE, LETTER, STEP, FOLLOW, CHARGE = (
    f"{NAME}/{name}" for name in ("books.book", "desk.queue", "mail.letter", "line.step", "track.follow", "till.charge")
)
SHAPES = (
    Shape((books, mail), {Order: "store"}, (BOOK,)),
    Shape((desk, line), {Order: "store"}, (QUEUE,), (QUEUE,), (STEP,)),
    Shape(
        (books, track), {Order: "store", Shipped: ["store", "broker"]}, (BOOK, FOLLOW), (FOLLOW,),
        outward=("sim.shipped",), ships=True,
    ),
    Shape((desk, mail), {Order: "broker"}, (QUEUE,), (QUEUE,), ingested=(QUEUE, LETTER)),
    Shape(
        (books, track), {Order: "store", Shipped: "broker"}, (BOOK, FOLLOW), (FOLLOW,), ingested=(FOLLOW,), ships=True
    ),
    Shape((desk, till), {Order: "store", Charge: "store"}, (QUEUE, CHARGE), (QUEUE,), charges=True),
)  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """Be what a seed makes of a run; a run has some kinds of faults only, so that they do not hide each other."""

    shape: Shape
    hosts: tuple[str, ...]
    limits: Limits
    slots: int
    errors: float
    """Chance of a call to the store or the broker to fail."""
    latency: float
    notify: float
    failing: float
    """Chance of a handler to misbehave."""
    pause: float
    cancels: int
    requests: int
    burst: int
    """Events of one large publish, so that there is something to hoard."""
    keys: int
    length: float
    """Virtual seconds during which things go wrong."""
    faults: tuple[str, ...]
    """What the nemesis may do."""
    name: str = NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shape, name)


FAULTS = ("crash", "stall", "forward", "back", "outage", "blackout", "restart", "terminate", "operate")


def draw(random: Random) -> Traits:
    """Return the traits of a run."""
    slots = random.choice((1, 2, 2, 3))
    faults = tuple(fault for fault in FAULTS if random.random() < 0.4)
    return Traits(
        shape=random.choice(SHAPES),
        hosts=("a", "b", "c") if random.random() < 0.2 else ("a", "b"),
        limits=Limits(
            lease=6.0, sweep=3.0, drain=random.choice((1.0, 3.0)), connect=2.0, concurrency=slots,
            batch=random.choice((2, 8, 256)),
        ),
        slots=slots,
        errors=random.choice((0.0, 0.0, 0.02, 0.1)),
        latency=random.choice((0.0, 0.0, 0.1, 0.4)),
        notify=random.choice((0.0, 0.8)),
        failing=random.choice((0.0, 0.1, 0.3)),
        pause=random.choice((0.0, 0.05, 0.5)),
        cancels=random.choice((0, 0, 3)),
        requests=random.choice((1, 2, 5)),
        burst=40 if random.random() < 0.1 else 3,
        keys=random.choice((1, 2, 4)),
        length=random.choice((1.0, 2.0, 5.0)),
        faults=faults,
    )  # fmt: skip


def quiet(shape: int = 0, **changes: Any) -> Traits:
    """Return traits of a run in which nothing goes wrong, but for the changes; the tests of found bugs use them."""
    slots = changes.pop("slots", 2)
    settings = {
        "shape": SHAPES[shape], "hosts": ("a", "b"), "slots": slots, "errors": 0.0, "latency": 0.1, "notify": 0.0,
        "failing": 0.0, "pause": 0.0, "cancels": 0, "requests": 2, "burst": 3, "keys": 2, "length": 2.0, "faults": (),
        "limits": Limits(lease=6.0, sweep=3.0, drain=3.0, connect=2.0, concurrency=slots),
    }  # fmt: skip
    return Traits(**{**settings, **changes})
