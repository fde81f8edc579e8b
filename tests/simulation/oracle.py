"""Judge every step of a run by the promises; the numbers are the invariants in ``docs/simulation.md``."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from eventbus.store import Claimed, Interest, NewEntry, Recipient, Settlement
from eventbus.stores._memory_box import Row
from eventbus.transport import Wire

if TYPE_CHECKING:
    from tests.simulation.world import Process, World

__all__ = ("Oracle", "Violation")

OVER = ("done", "dead", "discarded")


class Violation(AssertionError):  # noqa: N818 - what is violated is a promise
    """Say which invariant does not hold, and where."""


class Seen(NamedTuple):
    """Be what a row looked like after the last step that touched the table."""

    state: str
    claims: int
    failures: int
    due: int
    owner: str | None


def look(row: Row) -> Seen:
    """Return what a row looks like now."""
    return Seen(row.state, row.claims, row.failures, row.due, row.owner)


class Oracle:
    """Know what was committed, started, failed and lost, apart from what the engine says."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.rows: dict[int, Seen] = {}
        self.keys: dict[int, str | None] = {}
        """Lane of a row when it was written; it keeps its key for ever here."""
        self.known: dict[int, tuple[str, str]] = {}
        self.interests: dict[str, list[Interest]] = {}
        self.orders: set[str] = set()
        """Ids of the messages whose business row is committed, or that needed none."""
        self.expected: dict[tuple[str, str], None] = {}
        self.effects: Counter[tuple[str, str]] = Counter()
        self.sequence: dict[tuple[str, str], int] = {}
        self.starts: Counter[tuple[str, str]] = Counter()
        self.running: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.failures: Counter[tuple[str, str]] = Counter()
        self.again: Counter[tuple[str, str]] = Counter()
        self.excused: Counter[str] = Counter()
        """Recipient -> how many of its handlings may have come twice."""
        self.claims: dict[tuple[str, str, str], tuple[int, int]] = {}
        """Process, message and recipient -> seq and claims that the process got last."""
        self.refusals: Counter[str] = Counter()
        self.busy: dict[str, float] = {}
        self.set_back = 0.0
        self.jumped_at = -1e9

    # what happens in the database

    def committed(self, process: "Process", written: Sequence[Any], business: Sequence[tuple[str, str]]) -> None:
        """Check a commit: entries and business rows are of the same messages, effects and "done" of the same claim."""
        settlements = [one for one in written if isinstance(one, Settlement)]
        entries = [new for one in written if not isinstance(one, Settlement) for new in one]
        posted, bought = [new.message_id for new in entries], [id for table, id in business if table == "order"]
        self.require(1, sorted(posted) == sorted(bought), f"a commit has entries {posted} and orders {bought}")
        self.orders.update(posted)
        self._expect(entries)
        done = {(self.known[one.seq]) for one in settlements}
        made = [(id, table) for table, id in business if table != "order"]
        self.require(3, set(made) == done, f"a commit has effects {made} and settles {sorted(done)}")
        for effect in made:
            self.effects[effect] += 1
            self.require(3, self.effects[effect] == 1, f"{effect} took effect twice")
        changed = self._changes(entries)
        self._settled_by(settlements, changed)
        for one in settlements:
            self._in_sequence(one.seq)

    def added(self, process: "Process", entries: Sequence[NewEntry]) -> None:
        """Check an insertion without transaction: of a publisher, or of what came in from the broker."""
        for new in entries:
            ingested = not new.subscribers and not any(">" in one.name for one in new.recipients)
            self.require(1, not ingested or new.message_id in self.orders, f"{new.message_id} came from nowhere")
            self.orders.add(new.message_id)
        self._expect(entries)
        self._changes(entries)

    def _expect(self, entries: Sequence[NewEntry]) -> None:
        for new in entries:
            names = [one.name for one in new.recipients]
            if new.subscribers:
                names += [one.name for one in self.interests.get(new.type, ())]
            self.expected.update(dict.fromkeys((new.message_id, name) for name in names))

    def _changes(self, entries: Sequence[NewEntry] = ()) -> dict[int, tuple[Seen, Row]]:
        """Return the rows that a step changed; those it made must be of these entries."""
        box, changed = self.world.database.box, dict[int, tuple[Seen, Row]]()
        for seq, row in box._rows.items():
            now, before = look(row), self.rows.get(seq)
            if before is None:
                self.require(1, row.new in entries, f"row {seq} is of no entry that this step writes")
                self.keys[seq] = row.lane
                self.known[seq] = (row.new.message_id, row.recipient)
                self.require(2, list(self.known.values()).count(self.known[seq]) == 1, f"{self.known[seq]} twice")
            elif now != before:
                changed[seq] = before, row
            self.rows[seq] = now
        for seq, (before, row) in changed.items():
            self.require(4, row.claims >= before.claims, f"row {seq}: claims fell")
            self.require(4, row.claims <= before.claims + 1, f"row {seq}: claims jumped")
            self.require(2, before.state not in {"done", "discarded"}, f"row {seq} came back from {before.state}")
            bound = self.failures[self.known[seq]]
            self.require(8, row.failures <= bound, f"row {seq}: {row.failures} failures, where {bound} happened")
        return changed

    def _only(self, changed: Iterable[int], allowed: Iterable[int], verb: str) -> None:
        strange = sorted(set(changed) - set(allowed))
        self.require(9, not strange, f"{verb} changed rows {strange}, which are none of its business")

    def claimed(self, process: "Process", recipient: Recipient, limit: int, claimed: Claimed) -> None:
        """Check a claim: due rows only, of each lane the head only, each with its next number."""
        if not claimed.entries:
            return
        self.require(10, len(claimed.entries) <= limit, f"{len(claimed.entries)} claimed, where {limit} may be")
        changed, now = self._changes(), round(self.world.now() * 1000)
        self._only(changed, [entry.seq for entry in claimed.entries], "claim")
        for entry in claimed.entries:
            before, row = changed[entry.seq]
            self.require(4, before.state == "ready" and before.due <= now, f"row {entry.seq} was not to be claimed")
            self.require(4, row.claims == before.claims + 1 == entry.claims, f"row {entry.seq}: a claim is one more")
            self.claims[process.name, entry.message_id, recipient.name] = entry.seq, entry.claims
            if recipient.ordered:
                self._is_head(entry.seq, "claimed")

    def settled(self, process: "Process", settlements: Sequence[Settlement], lost: frozenset[int]) -> None:
        """Check settlements: each of a claim that still held."""
        self._settled_by([one for one in settlements if one.seq not in lost], self._changes())
        if not process.alive:
            return
        for one in settlements:
            id, recipient = self.known[one.seq]
            if one.seq not in lost and one.outcome in {"release", "again"} and one.after:
                self.again[id, recipient] += 1

    def _settled_by(self, settlements: Sequence[Settlement], changed: dict[int, tuple[Seen, Row]]) -> None:
        self._only(changed, [one.seq for one in settlements], "settle")
        for one in settlements:
            before = changed[one.seq][0]
            held = before.state == "ready" and before.owner is not None and before.claims == one.claims
            self.busy[self.known[one.seq][1]] = trio.current_time()
            self.require(4, held, f"row {one.seq} was settled with claim {one.claims}, and was {before}")

    def extended(self, held: Sequence[tuple[int, int]], lost: frozenset[int]) -> None:
        """Check that leases were extended by those who have them."""
        changed = self._changes()
        self._only(changed, [seq for seq, _ in held if seq not in lost], "extend")
        for seq, claims in held:
            if seq in changed:
                before, row = changed[seq]
                right = before.claims == row.claims == claims and row.state == "ready"
                self.require(4, right, f"row {seq} was extended with claim {claims}, and was {before}")

    def announced(self, interests: Sequence[Interest]) -> None:
        """Remember who listens."""
        self._only(self._changes(), [], "announce")
        for one in interests:
            wanted = self.interests.setdefault(one.type, [])
            if one not in wanted:
                wanted.append(one)

    def swept(self, retention: float) -> None:
        """Check that only what is over, and old, was pruned, and only leases that are too long were freed."""
        box = self.world.database.box
        for seq in [seq for seq in self.rows if seq not in box._rows]:
            seen = self.rows.pop(seq)
            old = seen.due < (self.world.now() - retention) * 1000
            self.require(2, seen.state in {"done", "discarded"} and old, f"row {seq} was pruned: {seen}")
        for seq, (before, row) in self._changes().items():
            freed = row.due < before.due and row.claims == before.claims and row.state == "ready"
            soon = before.due <= (self.world.now() + self.set_back + self.world.limits.lease) * 1000
            self.require(9, freed and (soon or before.owner), f"sweep changed row {seq}: {before}")

    def raised(self) -> None:
        """Check a replay, and let it excuse another start of each."""
        for seq, (before, row) in self._changes().items():
            self.require(4, before.state == "dead" and row.claims == before.claims + 1, f"replay of row {seq}")
            self.failures[self.known[seq]] = 0
            self.again[self.known[seq]] += 1

    def discarded(self) -> None:
        """Check that only dead rows were discarded."""
        for seq, (before, _) in self._changes().items():
            self.require(9, before.state == "dead", f"discard of row {seq}, which was {before.state}")

    # what happens in the handlers

    def started(self, process: "Process", id: str, recipient: str, *, ordered: bool, transactional: bool) -> None:
        """Check that a handler may start: its claim holds, and nothing before it in its lane is open."""
        if not process.alive:
            return
        self.starts[id, recipient] += 1
        self.running[process.name, recipient][id] += 1
        seq, claims = self.claims[process.name, id, recipient]
        row = self.world.database.box._rows[seq]
        stale = row.claims != claims or row.state != "ready"
        self.world.note(process.name, f"starts {recipient} {id} {seq}/{claims}{' stale' if stale else ''}")
        if stale:
            knew = trio.current_time() - self.jumped_at > self.world.limits.lease
            self.require(6, not transactional, f"{recipient} started {id} under a lost lease, with a transaction")
            self.require(6, not knew, f"{recipient} started {id} long after its lease was lost")
            self.excused[recipient] += 1
        elif ordered:
            self._is_head(seq, "started")
        running, slots = self.running[process.name, recipient], self.world.traits.slots
        self.require(10, running.total() <= slots, f"{running.total()} run in {recipient} of {process.name}")

    def ended(self, process: "Process", id: str, recipient: str) -> None:
        """Note that a handler ended, one way or the other."""
        running = self.running[process.name, recipient]
        if process.alive and running[id]:
            running[id] -= 1
            self.busy[recipient] = trio.current_time()
            self.world.note(process.name, f"ends {recipient} {id}")

    def failed(self, process: "Process", id: str, recipient: str) -> None:
        """Note that a handler failed by itself, not because it was cancelled."""
        self.failures[id, recipient] += 1

    def _is_head(self, seq: int, what: str) -> None:
        """Check that nothing before a row in its lane is open."""
        key, (_, recipient) = self.keys[seq], self.known[seq]
        if key is None or self.world.database.box._rows[seq].lane is None:
            return
        box = self.world.database.box
        blocks = recipient in self.world.traits.blocking
        for other, row in box._rows.items():
            if other < seq and self.keys[other] == key and row.recipient == recipient:
                open_ = row.state == "ready" and row.lane is not None
                open_ = open_ or (blocks and row.state == "dead" and row.lane is not None)
                self.require(5, not open_, f"{recipient}: row {seq} {what} before row {other} of key {key!r} is over")

    def _in_sequence(self, seq: int) -> None:
        """Check that effects of a lane are committed in its order."""
        key, (_, recipient) = self.keys[seq], self.known[seq]
        if key is None or recipient not in self.world.traits.ordered:
            return
        last = self.sequence.get((recipient, key), 0)
        replayed = self.again[self.known[seq]] > 0
        self.require(5, seq > last or replayed, f"{recipient}: row {seq} of key {key!r} took effect after row {last}")
        self.sequence[recipient, key] = max(seq, last)

    # what goes wrong

    def crashed(self, process: "Process") -> None:
        """Excuse as many duplicates as were in the slots."""
        self.lapsed(process)
        self.left(process)

    def left(self, process: "Process") -> None:
        """Forget what ran in a process that is over."""
        for key in [key for key in self.running if key[0] == process.name]:
            del self.running[key]

    def stopped(self, process: "Process") -> None:
        """Check that a process that was told to stop did, within the time it has for draining."""
        if process.told is None or self.world.troubled >= process.told:
            return
        took, most = trio.current_time() - process.told, self.world.limits.drain
        self.require(10, took <= most + 1.0, f"{process.name} took {took:.1f} s to stop, where it has {most:g} s")

    def lapsed(self, process: "Process") -> None:
        """Excuse the duplicates of what is in the slots of a process whose leases may run out."""
        self.excused.update(process.handling())

    def jumped(self, seconds: float) -> None:
        """Excuse the duplicates of a clock that was set forward, of what is claimed and not yet in a slot too."""
        self.jumped_at = trio.current_time()
        self.set_back += max(-seconds, 0.0)
        handled = sum((process.handling() for process in self.world.processes), Counter[str]())
        self.excused.update(handled | Counter(recipient for _, recipient in self.leased()))

    def excuse(self, recipient: str) -> None:
        """Excuse one duplicate: its settlement, or its commit, failed with an unknown outcome."""
        self.excused[recipient] += 1

    # what leaves and comes in

    def refuses(self, id: str) -> bool:
        """Tell whether the broker refuses a message for good this time."""
        world = self.world
        if not world.faulty or world.random.random() >= world.traits.errors / 2:
            return False
        self.failures[id, f"{world.traits.name}>broker"] += 1
        return True

    def went_out(self, wires: Sequence[Wire]) -> None:
        """Check that only what was committed leaves."""
        for wire in wires:
            self.require(1, wire.id in self.orders, f"{wire.id} went out, and was never committed")

    def acknowledged(self, id: str) -> None:
        """Check that what is acknowledged was ingested."""
        held = {self.known[seq][1] for seq in self.world.database.box._rows if self.known[seq][0] == id}
        missing = sorted(set(self.world.traits.ingested) - held)
        self.require(2, held and not missing, f"{id} was acknowledged and has no entry for {missing}")

    # at every tick, and at the end

    def tick(self) -> None:
        """Check that nothing that is due waits while somebody could take it."""
        world, now = self.world, trio.current_time()
        for process in world.processes:
            if process.works and process.engine is not None:
                self._ceilings(process)
        if not world.working() or any(process.frozen for process in world.processes):
            world.trouble()
            return
        for name in world.database.box._boxes:
            if all(process.handling()[name] >= world.traits.slots for process in world.working()):
                self.busy[name] = now
        for seq, row in world.database.box._rows.items():
            first = world.database.box._boxes.get(row.recipient)
            if row.state != "ready" or row.locked or first is None or not first._is_next(row.due, seq):
                continue
            due = row.due / 1000 - world.now() + now
            late = now - max(due, world.troubled, self.busy.get(row.recipient, 0.0))
            bound = world.limits.sweep + 1.5
            self.require(7, late <= bound, f"row {seq} of {row.recipient} is {late:.1f} s late, nobody takes it")

    def _ceilings(self, process: "Process") -> None:
        for channel in process.engine.worker.channels if process.engine.worker else ():
            count = len(channel.running)
            self.require(10, count <= channel.source.slots, f"{count} in the slots of {channel.source.name}")
        for claims in process.engine.claims.values():
            most = max(self.world.limits.batch, claims._slots)
            self.require(10, 0 <= claims._unsettled <= most, f"{claims._unsettled} claimed of {claims.recipient.name}")

    def in_hand(self) -> list[str]:
        """Return of which recipients some process believes to have something in hand."""
        claims = [one for process in self.world.working() for one in process.engine.claims.values()]
        return [one.recipient.name for one in claims if one._unsettled]

    def settled_all(self) -> bool:
        """Tell whether every entry is over, and nothing is left at the broker."""
        if self.in_hand() or any(process.requests for process in self.world.processes):
            return False
        rows = self.world.database.box._rows.values()
        return all(row.state in OVER for row in rows) and not any(
            queue.size
            for topic in self.world.broker.server._topics.values()
            for group, queue in topic.queues.items()
            if group != "others"
        )

    def final(self) -> None:
        """Check the whole story."""
        box = self.world.database.box
        rows = {self.known[seq]: row for seq, row in box._rows.items()}
        for wanted in self.expected:
            self.require(2, wanted in rows, f"{wanted} has no entry")
            self.require(2, rows[wanted].state in OVER, f"{wanted} is still {rows[wanted].state}")
        for pair, row in rows.items():
            self.require(1, pair[0] in self.orders, f"{pair} has an entry, and was never committed")
            self.require(10, row.owner is None and not row.locked, f"{pair} is still leased, to {row.owner}")
            if pair[1] in self.world.traits.transactional:
                done = row.state == "done"
                self.require(3, self.effects[pair] == done, f"{pair}: {self.effects[pair]} effects, {row.state}")
            if pair[1].endswith(">broker") and row.state == "done":
                self.require(2, self.world.broker.heard[pair[0]], f"{pair[0]} is done and never went out")
        twice: Counter[str] = Counter()
        for pair, starts in self.starts.items():
            twice[pair[1]] += max(starts - 1 - self.again[pair], 0)
        for recipient, count in sorted(twice.items()):
            most = self.excused[recipient]
            self.require(6, count <= most, f"{recipient} ran {count} times too often, {most} are excused")
        self.require(10, not self.world.database.units, "a transaction is still open")

    def require(self, number: int, fact: object, otherwise: str) -> None:
        """Raise ``Violation`` unless something is so."""
        if not fact:
            self.world.violated(Violation(f"invariant {number}: {otherwise}"))

    def leased(self) -> list[tuple[str, str]]:
        """Return what is leased."""
        return [self.known[seq] for seq, row in self.world.database.box._rows.items() if row.owner is not None]

    def left_over(self) -> list[tuple[int, str, Seen]]:
        """Return what is not over."""
        rows = self.world.database.box._rows
        return [(seq, row.recipient, look(row)) for seq, row in rows.items() if row.state not in OVER]
