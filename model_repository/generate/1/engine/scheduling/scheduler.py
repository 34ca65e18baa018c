"""The scheduler: decides which requests the next step computes and how many tokens of each, and preempts.

Plain Python without tensors. It passes over the running requests, best rank first: one token for each decoding request,
prompt chunks within a token budget, a share of it for the shortest prompt. Then it admits waiting requests while there
are slots and blocks. When blocks run out, the request of the worst rank is preempted: its blocks are released, and it
waits and is computed again later.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..monitoring.step_journal import HARMLESS_STEPS
from ..request import Request
from .blocks import BlockPool, BlockTable, Key
from .step_budget import StepBudget

# A matmul of this many rows takes as long as one of a single row, because it is bound by reading the weights. So draft
# tokens up to this batch size cost almost nothing.
_FREE_ROWS = 16
# A prompt of at most this share of the tokens that a longer one has left gets this share of a step's prompt tokens. So
# a short question does not wait for long documents before it, and they lose at most a quarter of their speed to it.
_PASSING_SHARE = 4
# How long a suspect of killing processes yields to all other waiting requests.
_SUSPECT_YIELD_SECONDS = 5.0


@dataclass(frozen=True)
class Slice:
    """Tokens `start` to `start + count` of one request, computed in this step. The last ones may be draft tokens."""

    request: Request
    start: int
    count: int
    draft_tokens: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        return self.count - len(self.draft_tokens)

    @property
    def ids(self) -> list[int]:
        return [*self.request.ids[self.start : self.start + self.known], *self.draft_tokens]

    @property
    def samples(self) -> bool:
        """Whether the slice holds the last known token, so that the next token is sampled."""
        return self.start + self.known == len(self.request.ids)

    @property
    def hidden_rows(self) -> range:
        """The rows whose last hidden states are needed: all rows of a prompt that is embedded or scored."""
        return range(self.count if self.request.needs_every_row else 0)

    @property
    def logit_rows(self) -> range:
        """The rows that tokens are sampled from: the last known token and all draft tokens."""
        samples = self.samples and not self.request.embeds
        return range(self.known - 1, self.count) if samples else range(0)


class Scheduler:
    def __init__(self, pool: BlockPool, slots: int, budget: StepBudget) -> None:
        self.pool = pool
        self.slots = slots
        self.budget = budget
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.preemptions = 0
        # Whether steps may have draft tokens.
        self.speculating = True
        # Called with the requests of the next step, before it is computed.
        self.on_step: Callable[[Sequence[Request]], None] = lambda requests: None
        # Called with a request that has run HARMLESS_STEPS steps, so that it is no suspect any more.
        self.on_harmless: Callable[[Request], None] = lambda request: None

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=lambda r: r.rank)

    def remove(self, request: Request) -> None:
        """Remove a running or waiting request and release its blocks."""
        (self.running if request in self.running else self.waiting).remove(request)
        self.pool.release(request.table)

    def slot_holders(self) -> set[int]:
        """The numbers of the requests that run, and of the waiting ones for which a slot is free."""
        free = max(0, self.slots - len(self.running))
        return {
            *(request.number for request in self.running),
            *(request.number for request in self.waiting[:free]),
            *(request.number for request in self.waiting if request.started),
        }

    def remove_where(self, condition: Callable[[Request], bool]) -> list[Request]:
        removed = [request for request in (*self.running, *self.waiting) if condition(request)]
        for request in removed:
            self.remove(request)
        return removed

    @property
    def decoding(self) -> bool:
        """Whether any running request decodes."""
        return any(request.decodes for request in self.running)

    def plan(self) -> list[Slice]:
        """The slices of the next step; empty if there is nothing to compute."""
        slices = self._plan()
        self.on_step([piece.request for piece in slices])
        return slices

    def _plan(self) -> list[Slice]:
        slices: list[Slice] = []
        budget = self.budget.tokens(self.decoding)
        isolated = self._isolated()
        passing = None if isolated else self._passing(budget)
        reserved = min(budget // _PASSING_SHARE, passing.remaining) if passing else 0
        for request in self._running_in_order():
            if isolated and request is not isolated:
                continue
            if request is passing:
                reserved = 0
            if request.remaining == 1:
                if self._allocate(request, 1):
                    drafts = self._draft_tokens(request)
                    slices.append(Slice(request, request.computed, 1 + len(drafts), drafts))
                continue
            # Tokens that a grammar forced are computed like a prompt's. Without a budget they go on one by one.
            count = min(request.remaining, max(budget - reserved, int(request.decodes)))
            if count and self._allocate(request, count):
                slices.append(Slice(request, request.computed, count))
                budget = max(budget - count, 0)
        while budget > 0 and not self._isolated() and (admitted := self._admit(self._next_waiting(bool(slices)))):
            count = min(admitted.remaining, budget)
            grown = self._allocate(admitted, count)
            assert grown
            slices.append(Slice(admitted, admitted.computed, count))
            budget -= count
        return slices

    def _passing(self, budget: int) -> Request | None:
        """A running request, admitted now if it waited, whose prompt is short beside the one that is computed first."""
        prompts = [request for request in self.running if request.remaining > 1 and not request.decodes]
        if not prompts or budget < _PASSING_SHARE:
            return None
        first = min(prompts, key=lambda r: r.rank)
        others = [*prompts, *(r for r in self.waiting if not r.isolated_steps)]
        shortest = min(others, key=lambda r: (r.parameters.priority, r.remaining, r.number))
        if shortest is first or shortest.remaining > first.remaining // _PASSING_SHARE:
            return None
        if shortest.parameters.priority > first.parameters.priority:
            return None
        return shortest if shortest in prompts or self._admit(shortest) else None

    def _isolated(self) -> Request | None:
        """The running request that must be computed without others, if any."""
        return next((request for request in self.running if request.isolated_steps), None)

    def still_running(self, plan: Sequence[Slice]) -> list[int]:
        """The indexes of the plan's slices whose requests still run."""
        running = {id(request) for request in self.running}
        return [row for row, piece in enumerate(plan) if id(piece.request) in running]

    def plan_async(self, plan: Sequence[Slice]) -> list[Slice]:
        """The decoding step after `plan`, whose tokens are not sampled yet: the slices of the requests that continue.

        Empty if waiting requests could be admitted first, or if blocks would have to be preempted.
        """
        rows = self.still_running(plan)
        if self._isolated():
            return []
        if len(rows) != len(self.running) or (self.waiting and len(self.running) < self.slots):
            return []
        rows = [row for row in rows if not plan[row].request.ends_next]
        requests = [plan[row].request for row in rows]
        # Room for the token that is computed now and for the one after it.
        ends = [request.computed + plan[row].count + 1 for row, request in zip(rows, requests, strict=True)]
        if not self._reserve(requests, ends):
            return []
        # Both steps are in flight from now on.
        self.on_step([piece.request for piece in plan])
        return [Slice(request, end - 1, 1) for request, end in zip(requests, ends, strict=True)]

    def reserve(self, plan: Sequence[Slice], count: int) -> bool:
        """Allocate blocks for so many tokens of each slice's request, the slice's own among them, if none must be
        preempted for them."""
        requests = [piece.request for piece in plan]
        return self._reserve(requests, [request.computed + count for request in requests])

    def _reserve(self, requests: Sequence[Request], ends: Sequence[int]) -> bool:
        missing = [
            max(self.pool.blocks_for(end) - len(request.table.blocks), 0)
            for end, request in zip(ends, requests, strict=True)
        ]
        if not self.pool.has(sum(missing)):
            return False
        for request, count in zip(requests, missing, strict=True):
            if count:
                request.table.blocks += self.pool.take(count)
        return True

    def _running_in_order(self) -> Iterator[Request]:
        """The running requests, best rank first. Preemption may shorten the list from its end during the iteration."""
        # A new list: other threads count the running requests, and a list is empty while it is sorted in place.
        self.running = sorted(self.running, key=lambda r: r.rank)
        index = 0
        while index < len(self.running):
            request = self.running[index]
            yield request
            if index < len(self.running) and self.running[index] is request:
                index += 1

    def _allocate(self, request: Request, count: int) -> bool:
        """Allocate blocks for `count` more tokens of the request. Preempt from the end of the list if needed."""
        needed = self.pool.blocks_for(request.computed + count) - len(request.table.blocks)
        while not self.pool.has(needed):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        if needed > 0:
            request.table.blocks += self.pool.take(needed)
        return True

    def _draft_tokens(self, request: Request) -> tuple[int, ...]:
        """Draft tokens, limited to what costs almost nothing and to the blocks that are free without preemption."""
        if request.prompt_lookup is None or not self.speculating:
            return ()
        assert request.parameters.max_tokens is not None
        limit = min(_FREE_ROWS // len(self.running), request.parameters.max_tokens - request.generated) - 1
        spare = self.pool.available - len(self.running)
        limit = min(limit, (len(request.table.blocks) + max(spare, 0)) * self.pool.block_tokens - request.computed - 1)
        drafts: tuple[int, ...] = request.prompt_lookup.propose(request.ids, limit)
        if request.constraint:
            drafts = drafts[: request.constraint.accepted(drafts)]
        grown = self._allocate(request, 1 + len(drafts))
        assert grown
        return drafts

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.release(request.table)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)

    def _next_waiting(self, others_in_step: bool) -> Request | None:
        """The best waiting request. An isolated request yields to the others for a while, and needs an empty step."""
        if not self.waiting or len(self.running) >= self.slots:
            return None
        now = time.monotonic()
        best = min(
            self.waiting, key=lambda r: (bool(r.isolated_steps) and now - r.arrived_at < _SUSPECT_YIELD_SECONDS, r.rank)
        )
        return None if best.isolated_steps and others_in_step else best

    def _admit(self, request: Request | None) -> Request | None:
        """Move the waiting request to the running ones, if a slot and enough blocks are free."""
        if request is None or len(self.running) >= self.slots:
            return None
        reusable = request.reusable_ids
        request.table = self.pool.match(reusable, request.prefix_key)
        if self._is_being_computed(self.pool.key_after(request.table, reusable)):
            request.table = BlockTable()
            return None
        # Keep what the running prompts still need, and one block for each running request to grow, so that the
        # admission does not cause a preemption.
        headroom = sum(max(self._missing_blocks(other), 1) for other in self.running)
        held = sum(1 for block in request.table.blocks if self.pool.is_idle(block))
        needed = self._missing_blocks(request)
        if self.running and not self.pool.has(needed + held + headroom):
            request.table = BlockTable()
            return None
        self.waiting.remove(request)
        self.pool.hold(request.table.blocks)
        request.computed = request.table.published * self.pool.block_tokens
        if not request.started:
            request.started = True
            request.cached_tokens = min(request.computed, len(request.prompt_ids))
        self.running.append(request)
        return request

    def _missing_blocks(self, request: Request) -> int:
        """Blocks that the request needs beside its own for all its tokens and the next one."""
        return self.pool.blocks_for(len(request.ids) + 1) - len(request.table.blocks)

    def _is_being_computed(self, key: Key | None) -> bool:
        """Whether a running request computes this block now. Waiting one step is cheaper than computing it twice."""
        return key is not None and any(
            request.remaining > 1 and self.pool.key_after(request.table, request.ids) == key for request in self.running
        )

    def advance(self, piece: Slice) -> None:
        """Note that the slice is computed, and publish its full blocks. Draft tokens do not count before acceptance."""
        self.accept(piece.request, piece.known)
        piece.request.steps += 1
        if piece.samples and piece.request.isolated_steps:
            piece.request.isolated_steps -= 1
        if piece.request.steps == HARMLESS_STEPS:
            self.on_harmless(piece.request)

    def accept(self, request: Request, count: int) -> None:
        """Note that `count` more of the request's tokens are in the KV cache."""
        request.computed += count
        self.pool.publish(request.table, request.ids, request.computed)
