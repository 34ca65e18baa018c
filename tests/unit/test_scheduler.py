"""The scheduler under random traffic: invariants after every step, every request ends, nothing is computed twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from engine.request import Request
from engine.scheduling.blocks import BlockPool
from engine.scheduling.scheduler import Scheduler, Slice
from engine.scheduling.speculation import PromptLookup
from engine.scheduling.step_budget import StepBudget
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonlm.contract import GenerationRequest, SamplingParameters

BLOCK = 4
# The longest request, in tokens. A pool of LONGEST // BLOCK blocks holds it alone.
LONGEST = 40


def make(
    prompt: list[int], max_tokens: int = 4, priority: int = 2, speculative: bool = False, **parameters: object
) -> Request:
    sampling = SamplingParameters.from_mapping(
        {"max_tokens": max_tokens, "priority": priority, "seed": 0, **parameters}
    )
    request = Request("", prompt, GenerationRequest(sampling, True), lambda *_: None)
    request.prompt_lookup = PromptLookup(8) if speculative else None
    return request


@dataclass
class FakeEngine:
    """Steps a scheduler as the engine does. Sampled tokens are consecutive numbers."""

    scheduler: Scheduler
    ended: list[Request] = field(default_factory=list)
    accepted: int = 0

    def step(self) -> list[Slice]:
        before = list(self.scheduler.running)
        plan = self.scheduler.plan()
        self.check(plan, before)
        for piece in plan:
            self.scheduler.advance(piece)
            request = piece.request
            if piece.samples:
                self.sample(piece)
                if request.generated >= (request.parameters.max_tokens or 0):
                    self.scheduler.remove(request)
                    self.ended.append(request)
        self.scheduler.pool.check()
        return plan

    def sample(self, piece: Slice) -> None:
        request, accepted = piece.request, 0
        # Requests with speculative decoding get a text that repeats itself.
        request.ids.append(len(request.ids) // 3 % 2 if request.prompt_lookup else 1000 + len(request.ids))
        while accepted < len(piece.draft_tokens) and request.ids[-1] == piece.draft_tokens[accepted]:
            accepted += 1
            self.scheduler.accept(request, 1)
            request.ids.append(len(request.ids) // 3 % 2)
        if piece.draft_tokens:
            request.prompt_lookup.record(len(piece.draft_tokens), accepted)
        self.accepted += accepted

    def check(self, plan: list[Slice], before: list[Request]) -> None:
        scheduler, pool = self.scheduler, self.scheduler.pool
        assert len(scheduler.running) <= scheduler.slots
        assert len({id(piece.request) for piece in plan}) == len(plan)
        prompt_tokens = sum(piece.known for piece in plan if piece.known > 1)
        assert prompt_tokens <= scheduler.budget.tokens(scheduler.decoding)
        for piece in plan:
            assert piece.request in scheduler.running
            assert piece.start == piece.request.computed
            assert piece.request.generated + len(piece.draft_tokens) < (piece.request.parameters.max_tokens or 1)
            assert pool.blocks_for(piece.start + piece.count) <= len(piece.request.table.blocks)
        # A preempted request has a worse rank than all requests that keep running.
        preempted = [request for request in before if request in scheduler.waiting]
        kept = [request for request in before if request in scheduler.running]
        assert not preempted or not kept or min(r.rank for r in preempted) > max(r.rank for r in kept)

    def run(self, steps: int = 2000) -> None:
        for _ in range(steps):
            if not self.step():
                assert not self.scheduler.running
                assert not self.scheduler.waiting
                assert self.scheduler.pool.used == 0
                return
        raise AssertionError("requests are left after the last step")


def make_engine(blocks: int = 60, slots: int = 8, prefill_tokens: int = 16) -> FakeEngine:
    return FakeEngine(Scheduler(BlockPool(blocks + 1, BLOCK), slots, StepBudget(prefill_tokens, BLOCK, 0, 0)))


requests = st.builds(
    make,
    # Few distinct tokens, so that prefixes are shared often.
    st.lists(st.integers(0, 1), min_size=1, max_size=30),
    st.integers(1, LONGEST - 30),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(requests, st.just("step"), st.integers(0, 20)), max_size=60),
    st.integers(LONGEST // BLOCK, 40),
    st.integers(1, 6),
    st.integers(1, 24),
)
def test_every_request_ends_under_random_arrivals_and_cancels(
    events: list[Request | str | int], blocks: int, slots: int, prefill_tokens: int
) -> None:
    engine = make_engine(blocks, slots, prefill_tokens)
    arrived, cancelled = [], 0
    for event in events:
        if isinstance(event, Request):
            engine.scheduler.add(event)
            arrived.append(event)
        elif isinstance(event, int):
            here = [*engine.scheduler.running, *engine.scheduler.waiting]
            if here:
                engine.scheduler.remove(here[event % len(here)])
                cancelled += 1
        else:
            engine.step()
    engine.run()
    assert len(engine.ended) == len(arrived) - cancelled
    for request in engine.ended:
        assert request.generated == request.parameters.max_tokens


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=20), st.lists(st.booleans(), max_size=30), st.integers(1, 6))
def test_every_request_ends_whether_or_not_the_pool_may_grow(
    arrived: list[Request], grants: list[bool], slots: int
) -> None:
    engine, least = make_engine(60, slots), LONGEST // BLOCK
    engine.scheduler.pool = BlockPool(
        61, BLOCK, least, lambda usable: usable if grants and grants.pop() else engine.scheduler.pool.usable
    )
    for request in arrived:
        engine.scheduler.add(request)
        engine.step()
    engine.run()
    assert len(engine.ended) == len(arrived)


def test_decoding_continues_while_a_long_prompt_is_computed_in_chunks() -> None:
    engine = make_engine(prefill_tokens=8)
    short, long = make([1, 2], max_tokens=10), make(list(range(30)))
    engine.scheduler.add(short)
    engine.step()
    engine.scheduler.add(long)
    counts = [{piece.request.number: piece.count for piece in engine.step()} for _ in range(4)]
    assert [step[long.number] for step in counts] == [8, 8, 8, 6]
    assert [step[short.number] for step in counts] == [1] * 4


def last_steps(engine: FakeEngine, requests: list[Request]) -> list[int]:
    """For each request, the number of the step that ends it."""
    ends: dict[int, int] = {}
    for number in range(1, 1000):
        if not engine.step():
            break
        for request in engine.ended[len(ends) :]:
            ends[request.number] = number
    return [ends[request.number] for request in requests]


def test_a_short_prompt_does_not_wait_for_long_ones() -> None:
    engine = make_engine(blocks=400, prefill_tokens=16)
    long = [make([number] * 320, max_tokens=1) for number in range(3)]
    short = make([9] * 8, max_tokens=1)
    for request in long:
        engine.scheduler.add(request)
    engine.step()
    engine.scheduler.add(short)
    # A quarter of a step is 4 tokens. The long prompts take 20 steps each; the short one delays them by half a step.
    assert last_steps(engine, [*long, short]) == [20, 40, 60, 2]


@pytest.mark.parametrize("length", [81, 320])
def test_prompts_of_similar_length_are_computed_one_after_the_other(length: int) -> None:
    engine = make_engine(blocks=400, prefill_tokens=16)
    first, second = make([1] * 320, max_tokens=1), make([2] * length, max_tokens=1)
    for request in (first, second):
        engine.scheduler.add(request)
        engine.step()
    assert second in engine.scheduler.waiting


def test_short_prompts_take_a_quarter_of_a_long_ones_steps_however_many_they_are() -> None:
    engine = make_engine(blocks=400, prefill_tokens=16)
    long = make([1] * 320, max_tokens=1)
    engine.scheduler.add(long)
    steps = 0
    while long not in engine.ended:
        engine.scheduler.add(make([2 + steps] * 9, max_tokens=1))
        engine.step()
        steps += 1
    assert steps <= 1 + 320 * 4 // (3 * 16)
    engine.run()


def test_a_short_prompt_of_worse_priority_passes_no_long_one() -> None:
    engine = make_engine(blocks=400, prefill_tokens=16)
    long, short = make([1] * 320, max_tokens=1), make([2] * 8, max_tokens=1, priority=3)
    for request in (long, short):
        engine.scheduler.add(request)
    assert last_steps(engine, [long, short]) == [20, 21]


def test_an_admission_leaves_the_blocks_that_a_running_prompt_still_needs() -> None:
    # The long prompt needs 16 of 18 blocks and a block to grow; the short one would need two.
    engine = make_engine(blocks=18, prefill_tokens=16)
    long, short = make([1] * 64, max_tokens=2), make([2] * 7, max_tokens=1)
    engine.scheduler.add(long)
    engine.step()
    engine.scheduler.add(short)
    engine.run()
    assert engine.scheduler.preemptions == 0
    assert engine.ended == [long, short]


def test_draft_tokens_save_steps_and_preempt_no_request() -> None:
    engine = make_engine(blocks=20)
    request = make([0, 0, 0, 1, 1, 1] * 4, max_tokens=30, speculative=True)
    engine.scheduler.add(request)
    steps = 0
    while request not in engine.ended:
        engine.step()
        steps += 1
    assert engine.accepted >= 15
    assert steps + engine.accepted == 30 + 1
    # No draft tokens with too many requests at once, or in a pool without free blocks.
    for count, blocks in ((9, 200), (2, 12)):
        engine = make_engine(blocks=blocks, slots=16, prefill_tokens=400)
        for number in range(count):
            engine.scheduler.add(make([2 + number, *[0, 0, 0, 1, 1, 1] * 3], max_tokens=4, speculative=True))
        engine.step()
        engine.step()
        assert all(len(piece.request.table.blocks) * BLOCK < piece.start + 1 + BLOCK for piece in engine.step())
        assert count < 9 or not engine.accepted


def test_slots_go_by_priority_then_by_arrival() -> None:
    engine = make_engine(slots=1)
    low, first, second = make([1], priority=3), make([2]), make([3])
    for request in (low, first, second):
        engine.scheduler.add(request)
    engine.run()
    assert engine.ended == [first, second, low]


def test_a_shared_prompt_is_computed_once() -> None:
    engine = make_engine(prefill_tokens=64)
    prompt = list(range(17))
    for _ in range(4):
        engine.scheduler.add(make(list(prompt)))
    computed = sum(piece.count for piece in engine.step()) + sum(piece.count for piece in engine.step())
    # 17 tokens once, one token after the last full block for each other request, and one decoded token of the first.
    assert computed == 17 + 3 + 1
    assert sorted(request.cached_tokens for request in engine.scheduler.running) == [0, 16, 16, 16]


def test_without_free_blocks_the_last_request_is_preempted_and_ends_later() -> None:
    engine = make_engine(blocks=10, prefill_tokens=64)
    first, second = make([1] * 10, max_tokens=20), make([2] * 10, max_tokens=20)
    engine.scheduler.add(first)
    engine.scheduler.add(second)
    engine.run()
    assert (first.preemptions, engine.scheduler.preemptions) == (0, second.preemptions)
    assert second.preemptions > 0
    assert engine.ended == [first, second]


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_a_removed_request_holds_no_block(state: str) -> None:
    engine = make_engine(slots=1)
    running, waiting = make([1] * 9), make([2] * 9)
    engine.scheduler.add(running)
    engine.scheduler.add(waiting)
    engine.step()
    engine.scheduler.remove(running if state == "running" else waiting)
    engine.run()
    assert engine.ended == [waiting if state == "running" else running]


def test_a_scored_prompt_ignores_the_prefix_cache() -> None:
    engine = make_engine(prefill_tokens=64)
    prompt = list(range(12))
    engine.scheduler.add(make(list(prompt)))
    engine.run()
    scored = make(list(prompt), echo=True, logprobs=0)
    engine.scheduler.add(scored)
    assert [piece.count for piece in engine.step()] == [12]
    assert scored.cached_tokens == 0


def test_a_scored_prompt_takes_from_the_prefix_cache_what_comes_before_its_first_row() -> None:
    engine = make_engine(prefill_tokens=64)
    prompt = list(range(30))
    scored = [
        make([*prompt, 90 + number], echo=True, logprobs=0, logprobs_start=start)
        for number, start in enumerate((29, 29, 25, 24, 1, 99))
    ]
    for request in scored:
        engine.scheduler.add(request)
    engine.run()
    # The row before the first scored token is computed, and whole blocks come from the cache.
    block = engine.scheduler.pool.block_tokens
    assert [request.cached_tokens for request in scored] == [0, *(end // block * block for end in (28, 24, 23, 0, 30))]


def test_the_request_of_the_worst_rank_is_preempted_and_not_the_latest() -> None:
    engine = make_engine(blocks=10, prefill_tokens=64)
    low, high = make([1] * 10, max_tokens=20, priority=3), make([2] * 10, max_tokens=20, priority=1)
    engine.scheduler.add(low)
    engine.step()
    engine.scheduler.add(high)
    engine.run()
    assert high.preemptions == 0
    assert low.preemptions > 0
    assert engine.ended == [high, low]


def test_an_admission_leaves_blocks_for_running_requests() -> None:
    # The first request holds 3 of 6 blocks. The second needs 2, which would leave one block for both to grow.
    engine = make_engine(blocks=6, prefill_tokens=64)
    first, second = make([1] * 11, max_tokens=9), make([2] * 11, max_tokens=1)
    engine.scheduler.add(first)
    engine.step()
    engine.scheduler.add(second)
    engine.step()
    assert engine.scheduler.waiting == [second]
    engine.run()
    assert engine.scheduler.preemptions == 0
    assert engine.ended == [first, second]


def test_a_request_without_a_block_for_itself_waits_and_the_others_continue() -> None:
    engine = make_engine(blocks=6, prefill_tokens=64)
    first, last = make([1] * 8, max_tokens=2), make([2] * 7, max_tokens=12)
    for request in (first, last):
        engine.scheduler.add(request)
    while not engine.scheduler.preemptions:
        plan = engine.step()
        assert plan, "at least one request always runs"
        if first in engine.ended:
            break
    engine.run()
    assert {id(request) for request in engine.ended} == {id(first), id(last)}
