"""Decides what the next step computes: who runs, how much of each, who waits, who has to step back.

Plain Python without tensors. One pass over the running requests, best rank first: one token for each that decodes,
prompt chunks within a token budget; then waiting requests are admitted while there are places and blocks. When
blocks run out, the request of the worst rank is preempted: its blocks go, it waits, and later computes again.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..monitoring.step_journal import HARMLESS_STEPS
from ..request import Request
from .blocks import BlockPool, Key
from .step_budget import StepBudget

# A product takes as long for so many rows as for one: the weights' way to the processor is what takes the time.
_FREE_ROWS = 16
# For so long whoever is suspected of killing processes lets others go first.
_OTHERS_FIRST_SECONDS = 5.0


@dataclass(frozen=True)
class Slice:
    """Tokens `start` to `start + count` of one request, computed in this step; the last of them may be guesses."""

    request: Request
    start: int
    count: int
    guesses: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        return self.count - len(self.guesses)

    @property
    def ids(self) -> list[int]:
        return [*self.request.ids[self.start : self.start + self.known], *self.guesses]

    @property
    def samples(self) -> bool:
        """Whether the last known token is among them, so that the next one can be sampled."""
        return self.start + self.known == len(self.request.ids)

    @property
    def hidden_rows(self) -> range:
        """Those whose last hidden states are wanted: every one of a prompt that is embedded or scored."""
        return range(self.count if self.request.needs_every_row else 0)

    @property
    def logit_rows(self) -> range:
        """Those that tokens are sampled from: the last known one and all guesses."""
        samples = self.samples and not self.request.embeds
        return range(self.known - 1, self.count) if samples else range(0)


class Scheduler:
    def __init__(self, pool: BlockPool, places: int, budget: StepBudget) -> None:
        self.pool = pool
        self.places = places
        self.budget = budget
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.preemptions = 0
        # Whether those who can guess are to.
        self.guessing = True
        # Told what is computed next.
        # Told who has come through so many steps that it is no suspect any more.
        self.harmless: Callable[[Request], None] = lambda request: None
        self.note: Callable[[Sequence[Request]], None] = lambda requests: None

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=lambda r: r.rank)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is, and free its blocks."""
        (self.running if request in self.running else self.waiting).remove(request)
        self.pool.release(request.table)

    def with_slot(self) -> set[int]:
        """The numbers of those that run, and of those that wait for a step alone: a slot is free for them."""
        free = max(0, self.places - len(self.running))
        return {
            *(request.number for request in self.running),
            *(request.number for request in self.waiting[:free]),
            *(request.number for request in self.waiting if request.started),
        }

    def remove_where(self, condition: Callable[[Request], bool]) -> list[Request]:
        found = [request for request in (*self.running, *self.waiting) if condition(request)]
        for request in found:
            self.remove(request)
        return found

    @property
    def decoding(self) -> bool:
        """Whether any sequence waits for its next token."""
        return any(request.remaining == 1 for request in self.running)

    def plan(self) -> list[Slice]:
        """What to compute in the next step; empty when there is nothing to do."""
        slices = self._plan()
        self.note([piece.request for piece in slices])
        return slices

    def _plan(self) -> list[Slice]:
        slices: list[Slice] = []
        budget = self.budget.tokens(self.decoding)
        apart = self._apart()
        for request in self._running_in_order():
            if apart and request is not apart:
                continue
            if request.remaining == 1:
                if self._make_room(request, 1):
                    guesses = self._guesses(request)
                    slices.append(Slice(request, request.computed, 1 + len(guesses), guesses))
                continue
            count = min(request.remaining, budget)
            if count and self._make_room(request, count):
                slices.append(Slice(request, request.computed, count))
                budget -= count
        while budget > 0 and not self._apart() and (admitted := self._admit(bool(slices))):
            count = min(admitted.remaining, budget)
            grown = self._make_room(admitted, count)
            assert grown
            slices.append(Slice(admitted, admitted.computed, count))
            budget -= count
        return slices

    def _apart(self) -> Request | None:
        """The running request that is computed without others."""
        return next((request for request in self.running if request.apart_steps), None)

    def still_running(self, plan: Sequence[Slice]) -> list[int]:
        """Which of the plan's slices are of requests that run."""
        running = {id(request) for request in self.running}
        return [row for row, piece in enumerate(plan) if id(piece.request) in running]

    def plan_after(self, plan: Sequence[Slice]) -> tuple[list[int], list[Slice]]:
        """The step after this one, whose tokens are not known yet: which of its rows go on, each one token further.

        None, where others could be let in first, or blocks would have to be taken from somebody.
        """
        rows = self.still_running(plan)
        if self._apart():
            return [], []
        if len(rows) != len(self.running) or (self.waiting and len(self.running) < self.places):
            return [], []
        rows = [row for row in rows if not plan[row].request.ends_next]
        requests = [plan[row].request for row in rows]
        # The token that is computed now, and the one after it.
        ends = [request.computed + plan[row].count + 1 for row, request in zip(rows, requests, strict=True)]
        wanted = [
            self.pool.blocks_for(end) - len(request.table.blocks) for end, request in zip(ends, requests, strict=True)
        ]
        if not self.pool.has(sum(wanted)):
            return [], []
        for request, count in zip(requests, wanted, strict=True):
            if count > 0:
                request.table.blocks += self.pool.take(count)
        # Both steps are under way then.
        self.note([piece.request for piece in plan])
        return rows, [Slice(request, end - 1, 1) for request, end in zip(requests, ends, strict=True)]

    def _running_in_order(self) -> Iterator[Request]:
        """Best rank first. Preemption shortens the list from its end while it is being walked."""
        self.running.sort(key=lambda r: r.rank)
        index = 0
        while index < len(self.running):
            request = self.running[index]
            yield request
            if index < len(self.running) and self.running[index] is request:
                index += 1

    def _make_room(self, request: Request, count: int) -> bool:
        """Give the request blocks for `count` more tokens, preempting from the end of the list if need be."""
        needed = self.pool.blocks_for(request.computed + count) - len(request.table.blocks)
        while not self.pool.has(needed):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        if needed > 0:
            request.table.blocks += self.pool.take(needed)
        return True

    def _guesses(self, request: Request) -> tuple[int, ...]:
        """As many as cost next to nothing, and as there are blocks for without taking any from others."""
        if request.lookup is None or not self.guessing:
            return ()
        assert request.parameters.max_tokens is not None
        room = min(_FREE_ROWS // len(self.running), request.parameters.max_tokens - request.generated) - 1
        spare = self.pool.available - len(self.running)
        room = min(room, (len(request.table.blocks) + max(spare, 0)) * self.pool.block_tokens - request.computed - 1)
        guesses: tuple[int, ...] = request.lookup.guess(request.ids, room)
        grown = self._make_room(request, 1 + len(guesses))
        assert grown
        return guesses

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.release(request.table)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)

    def _next_waiting(self, others_in_step: bool) -> Request | None:
        """The best waiting request. One that is computed apart comes after the others, if it has not waited long, and
        begins a step of its own."""
        now = time.monotonic()
        found = min(
            self.waiting, key=lambda r: (bool(r.apart_steps) and now - r.arrived < _OTHERS_FIRST_SECONDS, r.rank)
        )
        return None if found.apart_steps and others_in_step else found

    def _admit(self, others_in_step: bool) -> Request | None:
        """Move the best waiting request to the running ones, if there is a slot and there are blocks for it."""
        if not self.waiting or len(self.running) >= self.places:
            return None
        request = self._next_waiting(others_in_step)
        if request is None:
            return None
        if not request.needs_every_row:
            request.table = self.pool.match(request.ids)
            if self._is_being_computed(self.pool.key_after(request.table, request.ids)):
                request.table = type(request.table)()
                return None
        # Room to grow for those that run already, so that admitting one does not mean preempting another.
        headroom = len(self.running)
        held = sum(1 for block in request.table.blocks if self.pool.is_idle(block))
        needed = self.pool.blocks_for(len(request.ids) + 1) - len(request.table.blocks)
        if self.running and not self.pool.has(needed + held + headroom):
            request.table = type(request.table)()
            return None
        self.waiting.remove(request)
        self.pool.hold(request.table.blocks)
        request.computed = request.table.published * self.pool.block_tokens
        if not request.started:
            request.started = True
            request.cached_tokens = min(request.computed, len(request.prompt_ids))
        self.running.append(request)
        return request

    def _is_being_computed(self, key: Key | None) -> bool:
        """Whether a running request is about to publish this block: waiting a step beats computing it twice."""
        return key is not None and any(
            request.remaining > 1 and self.pool.key_after(request.table, request.ids) == key for request in self.running
        )

    def advance(self, piece: Slice) -> None:
        """The slice has been computed: its full blocks become known to others. What was guessed is not, so far."""
        self.accept(piece.request, piece.known)
        piece.request.steps += 1
        if piece.samples and piece.request.apart_steps:
            piece.request.apart_steps -= 1
        if piece.request.steps == HARMLESS_STEPS:
            self.harmless(piece.request)

    def accept(self, request: Request, count: int) -> None:
        """So many more of the request's tokens are in the cache."""
        request.computed += count
        self.pool.publish(request.table, request.ids, request.computed)
