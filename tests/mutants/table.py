"""The lines to break: each is somewhere once, and the tests beside it fail without it."""

from dataclasses import dataclass

__all__ = ("MUTANTS", "Mutant")


@dataclass(frozen=True)
class Mutant:
    """Break one line of one file."""

    breaks: str
    """What goes wrong."""
    file: str
    line: str
    """A part of the file that is there exactly once."""
    broken: str
    """What stands in its place."""
    tests: tuple[str, ...]
    """Which tests have to notice."""


MEMORY_EXAM = ("tests/stores/test_memory.py::test_exam",)
SQLITE_EXAM = ("tests/stores/test_sqlite.py::test_exam",)
FOUND = "tests/simulation/test_found.py::test_"
CANCEL = "tests/simulation/test_cancel.py::test_"
ROUTE = "tests/test_store_route.py::test_"
TRANSACTIONS = "tests/test_transactions.py::test_"
WORKER = "tests/test_worker.py::test_"
TRANSPORT = "tests/transports/test_memory.py::test_"

STORES = (
    Mutant(
        "memory: an old claim still settles",
        "eventbus/stores/memory.py",
        "return row if row is not None and row.claims == claims else None",
        "return row",
        MEMORY_EXAM,
    ),
    Mutant(
        "memory: a transaction commits though its lease was taken",
        "eventbus/stores/memory.py",
        "if any(self.held(one.seq, one.claims) is None for one in settled):",
        "if False:",
        ("tests/stores/test_memory.py::test_commit_whose_lease_was_taken_writes_nothing",),
    ),
    Mutant(
        "memory: a transaction that is over keeps its row locks",
        "eventbus/stores/memory.py",
        "            row.locked = False\n        if kind is None:",
        "            pass\n        if kind is None:",
        MEMORY_EXAM,
    ),
    Mutant(
        "memory: a locked row is settled beside its transaction",
        "eventbus/stores/memory.py",
        "if row is None or row.locked:",
        "if row is None:",
        ("tests/stores/test_memory.py::test_row_that_a_transaction_holds_is_settled_by_nobody_else",),
    ),
    Mutant(
        "memory: a duplicate is a new entry",
        "eventbus/stores/memory.py",
        "if (new.message_id, name) in self._once:",
        "if False:",
        MEMORY_EXAM,
    ),
    Mutant(
        "memory: the waiting of a silent handler have no ceiling",
        "eventbus/stores/memory.py",
        "len(self._box(name).rows) >= self._limits.waiting",
        "len(self._box(name).rows) > 10**9",
        MEMORY_EXAM,
    ),
    Mutant(
        "memory: a savepoint that fails keeps its entries",
        "eventbus/stores/memory.py",
        "del self._written[mark:]",
        "pass",
        MEMORY_EXAM,
    ),
    Mutant(
        "memory: more than the head of a lane is claimed",
        "eventbus/stores/_memory_box.py",
        "and (row.lane is None or self.lanes[row.lane][0] == seq)",
        "",
        MEMORY_EXAM,
    ),
    Mutant(
        "memory: what is not due is claimed",
        "eventbus/stores/_memory_box.py",
        "is not None and row.due <= now:",
        "is not None:",
        MEMORY_EXAM,
    ),
    Mutant(
        "sqlite: an older claim passes the fence",
        "eventbus/stores/_sqlite_rows.py",
        'HELD = "WHERE seq = ? AND claims = ? AND',
        'HELD = "WHERE seq = ? AND claims >= ? AND',
        SQLITE_EXAM,
    ),
    Mutant(
        "sqlite: the lock looks at no claim",
        "eventbus/stores/_sqlite_rows.py",
        'LOCK = f"SELECT 1 FROM eventbus_entry {HELD}"',
        'LOCK = "SELECT 1 FROM eventbus_entry WHERE seq = ? AND ? > 0"',
        SQLITE_EXAM,
    ),
    Mutant(
        "sqlite: a claim gets no number of its own",
        "eventbus/stores/_sqlite_rows.py",
        'LEASE = """UPDATE eventbus_entry SET due_at = ?, claims = claims + 1,',
        'LEASE = """UPDATE eventbus_entry SET due_at = ?, claims = claims + 0,',
        SQLITE_EXAM,
    ),
    Mutant(
        "sqlite: a dead head does not block its lane",
        "eventbus/stores/_sqlite_rows.py",
        "WHERE recipient = ? AND lane > ? ORDER BY lane, seq LIMIT 1",
        "WHERE recipient = ? AND lane > ? AND state = 0 ORDER BY lane, seq LIMIT 1",
        SQLITE_EXAM,
    ),
    Mutant(
        "sqlite: the dead are pruned",
        "eventbus/stores/_sqlite_sweeping.py",
        "state IN (1, 3) AND due_at < ?",
        "state IN (1, 2, 3) AND due_at < ?",
        SQLITE_EXAM,
    ),
    Mutant(
        "sqlite: what is delayed for long is due when the clock was set back",
        "eventbus/stores/_sqlite_sweeping.py",
        "AND due_at > ? AND due_at <= ? LIMIT ?",
        "AND due_at > ? AND due_at <= ? + 1000000000000 LIMIT ?",
        SQLITE_EXAM,
    ),
    Mutant(
        "clock: it is not noticed that it was set back",
        "eventbus/clock.py",
        "if back > STEADY else 0",
        "if False else 0",
        MEMORY_EXAM,
    ),
    Mutant(
        "keeping: a round sweeps one batch",
        "eventbus/keeping.py",
        "            if swept < limits.batch:",
        "            if True:",
        ("tests/test_keeping.py::test_sweeps_go_on_until_one_finds_less_than_a_batch",),
    ),
    Mutant(
        "keeping: a round does not end where there is no more",
        "eventbus/keeping.py",
        "            if swept < limits.batch:",
        "            if False:",
        ("tests/test_keeping.py::test_sweeps_go_on_until_one_finds_less_than_a_batch",),
    ),
    Mutant(
        "sqlite: a transaction begins without the right to write",
        "eventbus/stores/sqlite.py",
        'for begin in ("BEGIN IMMEDIATE", "BEGIN"):',
        'for begin in ("BEGIN", "BEGIN"):',
        ("tests/stores/test_sqlite_faults.py::test_a_transaction_that_has_read_can_write",),
    ),
    Mutant(
        "sqlite: a savepoint that fails keeps its entries",
        "eventbus/stores/_sqlite_unit.py",
        "            self._steps = [savepoint.back]",
        "            self._steps = []",
        SQLITE_EXAM,
    ),
    Mutant(
        "sqlite: a transaction that fails commits",
        "eventbus/stores/_sqlite_unit.py",
        "            if kind is None:\n                end =",
        "            if True:\n                end =",
        SQLITE_EXAM,
    ),
)

TAKING = (
    Mutant(
        "claims: there is no ceiling of what is in hand",
        "eventbus/claims.py",
        "return free if self._unsettled < self._slots or free > most // 2 else 0",
        "return batch",
        (f"{ROUTE}a_lapsed_lease_is_taken_by_another_and_the_late_settle_is_refused",),
    ),
    Mutant(
        "claims: a process that stood still trusts its leases",
        "eventbus/claims.py",
        "self._claims.ledger.runtime.clock.monotonic() > self._until",
        "False",
        (f"{FOUND}what_was_hoarded_before_a_stall_is_not_started_after_it",),
    ),
    Mutant(
        "claims: what dies never blocks",
        "eventbus/claims.py",
        "blocks = self._claims.blocks and self.entry.lane is not None",
        "blocks = False",
        (f"{ROUTE}a_dead_head_lets_its_lane_go_on_or_blocks_it",),
    ),
    Mutant(
        "claims: nobody looks for what nobody woke for",
        "eventbus/claims.py",
        "        await self._nap(wait)\n",
        "        await self._nap(86_400.0)\n",
        ("tests/simulation/test_simulation.py::test_promises_hold_among_faults[0-24]",),
    ),
    Mutant(
        "claims: being released counts as a failure",
        "eventbus/claims.py",
        'return Settlement(seq, claims, "release", min(after, LONGEST))',
        'return Settlement(seq, claims, "again", min(after, LONGEST))',
        (f"{CANCEL}cancelled_lifetime_counts_no_failure",),
    ),
    Mutant(
        "ledger: a lost lease is not noticed",
        "eventbus/ledger.py",
        "told(newest[one.seq] == one.claims and one.seq not in lost, failed)",
        "told(True, failed)",
        (f"{ROUTE}a_lapsed_lease_is_taken_by_another_and_the_late_settle_is_refused",),
    ),
    Mutant(
        "ledger: two claims of one row are written together",
        "eventbus/ledger.py",
        "if newest[ticket.settlement.seq] == ticket.settlement.claims]",
        "]",
        (f"{FOUND}newer_claim_of_a_row_is_not_lost_with_the_older",),
    ),
    Mutant(
        "sources: an ordered message that waits goes back to the broker",
        "eventbus/sources.py",
        "return 0.0 if ordered else link.transport.capabilities.retry",
        "return link.transport.capabilities.retry",
        (f"{FOUND}ordered_intake_goes_on_after_the_store_was_away",),
    ),
    Mutant(
        "sources: a broker that is away counts as a failure",
        "eventbus/sources.py",
        "            if isinstance(failure, Lost):",
        "            if False:",
        ("tests/simulation/test_simulation.py::test_promises_hold_among_faults[0-24]",),
    ),
    Mutant(
        "sources: what could not be ingested is acknowledged",
        "eventbus/sources.py",
        "            return Postponed(outage.failed())\n        outage.over()\n        for",
        "            return Done()\n        outage.over()\n        for",
        (f"{FOUND}ordered_intake_goes_on_after_the_store_was_away",),
    ),
)

RUNNING = (
    Mutant(
        "worker: what is handled and not settled is forgotten",
        "eventbus/channel.py",
        "full = self._resting or len(self.running) >= self.source.slots",
        "full = self._resting",
        (f"{WORKER}slot_goes_on_while_its_settlement_is_on_its_way",),
    ),
    Mutant(
        "worker: a drain leaves settlements on their way behind",
        "eventbus/channel.py",
        "            while self.running and self._slots_ended.is_set():",
        "            while False:",
        (f"{WORKER}drain_waits_for_settlements_on_their_way",),
    ),
    Mutant(
        "worker: a woken slot that is cancelled is waited for",
        "eventbus/channel.py",
        "                self._called = False\n                self._wake()",
        "                pass",
        (f"{WORKER}woken_slot_that_is_cancelled_leaves_the_others_to_be_woken",),
    ),
    Mutant(
        "worker: a drain has no deadline",
        "eventbus/channel.py",
        "        with self._clock.move_on_after(grace):",
        "        with self._clock.move_on_after(10**6):",
        (f"{WORKER}drain_cuts_what_does_not_end",),
    ),
    Mutant(
        "worker: a drain goes on starting",
        "eventbus/channel.py",
        "                self._resting = True\n                await self._stop_intake()",
        "                await self._stop_intake()",
        (f"{WORKER}drain_starts_nothing_while_the_intake_stops",),
    ),
    Mutant(
        "worker: what a drain cuts is not handed back",
        "eventbus/channel.py",
        "            self._cut.append(delivery)",
        "            pass",
        (f"{WORKER}drain_cuts_what_does_not_end",),
    ),
    Mutant(
        "worker: a key goes on while its head is away",
        "eventbus/channel.py",
        "            lanes.send_away(delivery)",
        "            pass",
        (f"{WORKER}key_waits_for_a_failing_head_and_others_do_not",),
    ),
    Mutant(
        "worker: what was cut is settled",
        "eventbus/channel.py",
        "            over = not isinstance(verdict, Cut)",
        "            over = True",
        (f"{WORKER}slot_that_a_stranger_cancels_is_replaced",),
    ),
    Mutant(
        "worker: leases are extended too late",
        "eventbus/channel.py",
        "            await self._clock.sleep(every)",
        "            await self._clock.sleep(every * 9)",
        (f"{WORKER}leases_are_extended_while_anything_is_here",),
    ),
    Mutant(
        "worker: a lost subscription loses entries that are still ours",
        "eventbus/channel.py",
        "        if not self.source.lasting:",
        "        if True:",
        (f"{FOUND}failed_claim_leaves_no_entry_to_its_lease",),
    ),
    Mutant(
        "lanes: two of a key at a time",
        "eventbus/lanes.py",
        "                lane.append(delivery)\n                return False",
        "                lane.append(delivery)",
        ("tests/test_lanes.py::test_one_of_a_key_at_a_time",),
    ),
    Mutant(
        "lanes: the last of a key comes first",
        "eventbus/lanes.py",
        "        self._ready.append(lane.popleft())",
        "        self._ready.append(lane.pop())",
        ("tests/test_lanes.py::test_one_of_a_key_at_a_time",),
    ),
    Mutant(
        "delivery: being cancelled is a failure",
        "eventbus/delivery.py",
        "        if cut_short(before):",
        "        if False:",
        ("tests/test_delivery.py::test_cancellation_from_outside_is_neither_success_nor_failure",),
    ),
    Mutant(
        "engine: a cancelled lifetime does not drain",
        "eventbus/engine.py",
        "        with anyio.CancelScope(shield=True):\n            if self.broadcast",
        "        with anyio.CancelScope():\n            if self.broadcast",
        (f"{CANCEL}cancelled_lifetime_counts_no_failure",),
    ),
    Mutant(
        "engine: a cancelled lifetime cuts its tasks before they are drained",
        "eventbus/engine.py",
        "        shelter, ready, hired = anyio.CancelScope(shield=True),",
        "        shelter, ready, hired = anyio.CancelScope(),",
        (f"{CANCEL}cancelled_lifetime_counts_no_failure",),
    ),
    Mutant(
        "retry: one attempt too many",
        "eventbus/retry.py",
        "    if attempt >= policy.attempts:",
        "    if attempt > policy.attempts:",
        ("tests/test_retry.py",),
    ),
    Mutant(
        "link: an error of an earlier life ends the next",
        "eventbus/link.py",
        "        if life is self._up:\n            self._close()",
        "        if True:\n            self._close()",
        (
            "tests/test_link.py::test_errors_of_an_earlier_life_do_not_end_the_next",
            "tests/test_link.py::test_subscribing_that_fails_late_does_not_end_the_next_life",
        ),
    ),
)

WRITING = (
    Mutant(
        "entries: a dual write is let through",
        "eventbus/entries.py",
        "            if kept and level is None and atomic:",
        "            if False:",
        (f"{TRANSACTIONS}publish_outside_a_transaction_is_refused",),
    ),
    Mutant(
        "entries: a transaction commits without its events",
        "eventbus/entries.py",
        "            if failure is None:\n                await entries.flush(level)",
        "            if failure is not None:\n                await entries.flush(level)",
        (f"{TRANSACTIONS}commit_takes_rows_and_events_together",),
    ),
    Mutant(
        "entries: a transaction that is over takes events",
        "eventbus/entries.py",
        "        level.transaction.closed = True\n        try:",
        "        try:",
        (f"{TRANSACTIONS}transaction_that_is_over_refuses",),
    ),
    Mutant(
        "entries: a savepoint takes the place of what was before",
        "eventbus/entries.py",
        "            outer.entries += level.entries",
        "            outer.entries = level.entries",
        (f"{TRANSACTIONS}savepoint_takes_its_events_with_it",),
    ),
    Mutant(
        "entries: a cancelled caller parts the commit from what follows it",
        "eventbus/entries.py",
        "        self._spawn(finish)\n",
        "        await finish()\n",
        (f"{TRANSACTIONS}what_follows_a_commit_follows_though_the_caller_is_cancelled",),
    ),
    Mutant(
        "entries: savepoints side by side are nested by chance",
        "eventbus/entries.py",
        "        async with gate:",
        "        if gate:",
        (f"{TRANSACTIONS}savepoints_side_by_side_take_turns",),
    ),
)

CARRYING = (
    Mutant(
        "memory transport: a full queue takes more",
        "eventbus/transports/memory.py",
        "        elif fit and road.room() < len(fit):",
        "        elif False:",
        (f"{TRANSPORT}publishers_wait_in_line_and_a_wire_enters_all_groups_or_none",),
    ),
    Mutant(
        "memory transport: what went back is settled too",
        "eventbus/transports/_memory_queue.py",
        "if self.reader is None or self.reader.lost:",
        "if False:",
        (f"{TRANSPORT}closing_tells_each_publisher_which_wires_are_not_in",),
    ),
    Mutant(
        "memory transport: prefetch is no ceiling",
        "eventbus/transports/_memory_queue.py",
        "                and len(self.open) < self.prefetch",
        "                and True",
        (f"{TRANSPORT}exam",),
    ),
    Mutant(
        "memory transport: two ordered readers of a group at once",
        "eventbus/transports/_memory_queue.py",
        "and (not self.ordered or queue.heirs[0] is self)",
        "",
        (f"{TRANSPORT}exam",),
    ),
    Mutant(
        "memory transport: the dead outgrow their ceiling",
        "eventbus/transports/_memory_queue.py",
        "and queue.dead + queue.held < self.graves",
        "",
        (f"{TRANSPORT}a_group_pauses_before_its_dead_outgrow_their_ceiling",),
    ),
    Mutant(
        "memory transport: what comes back comes first",
        "eventbus/transports/_memory_queue.py",
        "if not self.ready or copy.place < self.ready[0].place:",
        "if True:",
        (f"{TRANSPORT}what_comes_back_takes_its_place_and_only_a_hand_back_counts_no_attempt",),
    ),
)

CALLING = (
    Mutant(
        "dispatch: an inline message drops its delay",
        "eventbus/dispatch.py",
        "        if delay and not plan.targets and not self.at_once:",
        "        if False:",
        ("tests/test_dispatch.py::test_delay_needs_a_route",),
    ),
    Mutant(
        "fanout: the exit of one handler ends in silence",
        "eventbus/fanout.py",
        "        if failure is None and self.group is not None:",
        "        if failure is not None and self.group is not None:",
        ("tests/test_fanout.py::test_exit_of_a_call_ends_the_others_and_comes_back",),
    ),
    Mutant(
        "invoker: a handler starts under a lost lease",
        "eventbus/invoker.py",
        "                if claim is not None and not await claim.lock(unit):",
        "                if False:",
        ("tests/simulation/test_simulation.py::test_promises_hold_among_faults[0-24]",),
    ),
)

MUTANTS = (*STORES, *TAKING, *RUNNING, *WRITING, *CARRYING, *CALLING)
