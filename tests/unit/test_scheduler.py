"""The scheduler under random traffic: invariants after every step, an end for everyone, nothing computed twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from engine.request import Request
from engine.scheduling.blocks import BlockPool
from engine.scheduling.scheduler import Scheduler, Slice
from engine.scheduling.speculation import Lookup
from engine.scheduling.step_budget import StepBudget
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonlm.contract import GenerationRequest, SamplingParameters

BLOCK = 4
# A pool of so many blocks holds the longest request alone.
LONGEST = 40


def make(
    prompt: list[int], max_tokens: int = 4, priority: int = 2, guesses: bool = False, **parameters: object
) -> Request:
    wanted = SamplingParameters.from_mapping({"max_tokens": max_tokens, "priority": priority, "seed": 0, **parameters})
    request = Request("", prompt, GenerationRequest(wanted, True), lambda *_: None)
    request.lookup = Lookup(8) if guesses else None
    return request


@dataclass
class Machine:
    """Steps a scheduler as the engine does; every sampled token is the next number."""

    scheduler: Scheduler
    ended: list[Request] = field(default_factory=list)
    guessed: int = 0

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
        request, right = piece.request, 0
        # Who guesses has something to guess.
        request.ids.append(len(request.ids) // 3 % 2 if request.lookup else 1000 + len(request.ids))
        while right < len(piece.guesses) and request.ids[-1] == piece.guesses[right]:
            right += 1
            self.scheduler.accept(request, 1)
            request.ids.append(len(request.ids) // 3 % 2)
        if piece.guesses:
            request.lookup.judge(len(piece.guesses), right)
        self.guessed += right

    def check(self, plan: list[Slice], before: list[Request]) -> None:
        scheduler, pool = self.scheduler, self.scheduler.pool
        assert len(scheduler.running) <= scheduler.places
        assert len({id(piece.request) for piece in plan}) == len(plan)
        read = sum(piece.known for piece in plan if piece.known > 1)
        assert read <= scheduler.budget.tokens(scheduler.decoding)
        for piece in plan:
            assert piece.request in scheduler.running
            assert piece.start == piece.request.computed
            assert piece.request.generated + len(piece.guesses) < (piece.request.parameters.max_tokens or 1)
            assert pool.blocks_for(piece.start + piece.count) <= len(piece.request.table.blocks)
        # Whoever was preempted has a worse rank than all that ran before and still run.
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
        raise AssertionError("requests are left, and no end is in sight")


def machine(blocks: int = 60, places: int = 8, prefill_tokens: int = 16) -> Machine:
    return Machine(Scheduler(BlockPool(blocks + 1, BLOCK), places, StepBudget(prefill_tokens, BLOCK, 0, 0)))


requests = st.builds(
    make,
    # Few different tokens: prefixes are shared often.
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
def test_every_request_ends_whatever_comes_and_goes(
    events: list[Request | str | int], blocks: int, places: int, prefill_tokens: int
) -> None:
    driven = machine(blocks, places, prefill_tokens)
    arrived, cancelled = [], 0
    for event in events:
        if isinstance(event, Request):
            driven.scheduler.add(event)
            arrived.append(event)
        elif isinstance(event, int):
            here = [*driven.scheduler.running, *driven.scheduler.waiting]
            if here:
                driven.scheduler.remove(here[event % len(here)])
                cancelled += 1
        else:
            driven.step()
    driven.run()
    assert len(driven.ended) == len(arrived) - cancelled
    for request in driven.ended:
        assert request.generated == request.parameters.max_tokens


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=20), st.lists(st.booleans(), max_size=30), st.integers(1, 6))
def test_every_request_ends_whether_the_pool_may_grow_or_not(
    arrived: list[Request], answers: list[bool], places: int
) -> None:
    driven, least = machine(60, places), LONGEST // BLOCK
    driven.scheduler.pool = BlockPool(
        61, BLOCK, least, lambda usable: usable if answers and answers.pop() else driven.scheduler.pool.usable
    )
    for request in arrived:
        driven.scheduler.add(request)
        driven.step()
    driven.run()
    assert len(driven.ended) == len(arrived)


def test_decoding_goes_on_while_a_long_prompt_is_read_in_chunks() -> None:
    driven = machine(prefill_tokens=8)
    short, long = make([1, 2], max_tokens=10), make(list(range(30)))
    driven.scheduler.add(short)
    driven.step()
    driven.scheduler.add(long)
    counts = [{piece.request.number: piece.count for piece in driven.step()} for _ in range(4)]
    assert [step[long.number] for step in counts] == [8, 8, 8, 6]
    assert [step[short.number] for step in counts] == [1] * 4


def test_guesses_are_computed_along_and_cost_nobody_a_block() -> None:
    driven = machine(blocks=20)
    guessing = make([0, 0, 0, 1, 1, 1] * 4, max_tokens=30, guesses=True)
    driven.scheduler.add(guessing)
    steps = 0
    while guessing not in driven.ended:
        driven.step()
        steps += 1
    assert driven.guessed >= 15
    assert steps + driven.guessed == 30 + 1
    # Too many at once for a guess to be free, or a pool in which each block is somebody's.
    for crowd, blocks in ((9, 200), (2, 12)):
        driven = machine(blocks=blocks, places=16, prefill_tokens=400)
        for number in range(crowd):
            driven.scheduler.add(make([2 + number, *[0, 0, 0, 1, 1, 1] * 3], max_tokens=4, guesses=True))
        driven.step()
        driven.step()
        assert all(len(piece.request.table.blocks) * BLOCK < piece.start + 1 + BLOCK for piece in driven.step())
        assert crowd < 9 or not driven.guessed


def test_priority_then_arrival_decides_who_gets_a_place() -> None:
    driven = machine(places=1)
    low, first, second = make([1], priority=3), make([2]), make([3])
    for request in (low, first, second):
        driven.scheduler.add(request)
    driven.run()
    assert driven.ended == [first, second, low]


def test_a_shared_prompt_is_computed_once() -> None:
    driven = machine(prefill_tokens=64)
    prompt = list(range(17))
    for _ in range(4):
        driven.scheduler.add(make(list(prompt)))
    computed = sum(piece.count for piece in driven.step()) + sum(piece.count for piece in driven.step())
    # 17 tokens once; then for each other the token after the last full block; and one decoded by the first.
    assert computed == 17 + 3 + 1
    assert sorted(request.cached_tokens for request in driven.scheduler.running) == [0, 16, 16, 16]


def test_when_blocks_run_out_the_last_one_steps_back_and_ends_all_the_same() -> None:
    driven = machine(blocks=10, prefill_tokens=64)
    first, second = make([1] * 10, max_tokens=20), make([2] * 10, max_tokens=20)
    driven.scheduler.add(first)
    driven.scheduler.add(second)
    driven.run()
    assert (first.preemptions, driven.scheduler.preemptions) == (0, second.preemptions)
    assert second.preemptions > 0
    assert driven.ended == [first, second]


@pytest.mark.parametrize("where", ["running", "waiting"])
def test_what_is_removed_leaves_no_block(where: str) -> None:
    driven = machine(places=1)
    running, waiting = make([1] * 9), make([2] * 9)
    driven.scheduler.add(running)
    driven.scheduler.add(waiting)
    driven.step()
    driven.scheduler.remove(running if where == "running" else waiting)
    driven.run()
    assert driven.ended == [waiting if where == "running" else running]


def test_a_prompt_that_is_scored_is_computed_whole() -> None:
    driven = machine(prefill_tokens=64)
    prompt = list(range(12))
    driven.scheduler.add(make(list(prompt)))
    driven.run()
    scored = make(list(prompt), echo=True, logprobs=0)
    driven.scheduler.add(scored)
    assert [piece.count for piece in driven.step()] == [12]
    assert scored.cached_tokens == 0


def test_who_steps_back_is_of_the_worst_rank_not_the_last_to_come() -> None:
    driven = machine(blocks=10, prefill_tokens=64)
    low, high = make([1] * 10, max_tokens=20, priority=3), make([2] * 10, max_tokens=20, priority=1)
    driven.scheduler.add(low)
    driven.step()
    driven.scheduler.add(high)
    driven.run()
    assert high.preemptions == 0
    assert low.preemptions > 0
    assert driven.ended == [high, low]


def test_nobody_is_admitted_at_the_price_of_stepping_back_at_once() -> None:
    # The first holds 3 blocks; 3 are left, and the second would need 2 and leave the first none to grow into but one.
    driven = machine(blocks=6, prefill_tokens=64)
    first, second = make([1] * 11, max_tokens=9), make([2] * 11, max_tokens=1)
    driven.scheduler.add(first)
    driven.step()
    driven.scheduler.add(second)
    driven.step()
    assert driven.scheduler.waiting == [second]
    driven.run()
    assert driven.scheduler.preemptions == 0
    assert driven.ended == [first, second]


def test_the_last_one_that_finds_no_block_for_itself_waits_and_the_others_go_on() -> None:
    driven = machine(blocks=6, prefill_tokens=64)
    first, last = make([1] * 8, max_tokens=2), make([2] * 7, max_tokens=12)
    for request in (first, last):
        driven.scheduler.add(request)
    while not driven.scheduler.preemptions:
        plan = driven.step()
        assert plan, "somebody always goes on"
        if first in driven.ended:
            break
    driven.run()
    assert {id(request) for request in driven.ended} == {id(first), id(last)}
