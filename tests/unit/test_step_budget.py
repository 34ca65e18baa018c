"""A step's prompt tokens follow the measured speed: up and down, and never below one block."""

from __future__ import annotations

from engine.scheduling.step_budget import StepBudget
from hypothesis import given
from hypothesis import strategies as st

BLOCK, MOST = 16, 512


def made(decode_seconds: float = 0.15, prefill_seconds: float = 0.5) -> StepBudget:
    return StepBudget(MOST, BLOCK, decode_seconds, prefill_seconds)


@given(
    fixed=st.floats(0, 0.1),
    token_seconds=st.floats(1e-6, 0.02),
    decoding=st.booleans(),
)
def test_it_settles_where_a_full_step_takes_the_target(fixed: float, token_seconds: float, decoding: bool) -> None:
    budget, target = made(), 0.15 if decoding else 0.5
    for _ in range(40):
        tokens = budget.tokens(decoding)
        budget.note(decoding, tokens, fixed + tokens * token_seconds)
    tokens = budget.tokens(decoding)
    assert BLOCK <= tokens <= MOST
    if tokens > BLOCK:
        assert fixed + tokens * token_seconds <= target * 1.05
    if tokens < MOST:
        # Not more than one token fewer than what fits, as the share of the fixed part allows to find it.
        assert fixed + (tokens + 2) * token_seconds > target * 0.9


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2000), st.floats(0, 100))))
def test_whatever_is_measured_it_stays_between_a_block_and_the_most(steps: list[tuple[bool, int, float]]) -> None:
    budget = made()
    for decoding, tokens, seconds in steps:
        budget.note(decoding, tokens, seconds)
        assert all(BLOCK <= budget.tokens(mode) <= MOST for mode in (True, False))


def test_a_step_that_was_not_full_does_not_raise_it() -> None:
    budget = made()
    before = budget.tokens(True)
    budget.note(True, before - 1, 0.001)
    assert budget.tokens(True) == before
    budget.note(True, before, 0.001)
    assert budget.tokens(True) > before


def test_one_that_held_up_the_streams_lowers_it_though_it_was_not_full() -> None:
    budget = made()
    for _ in range(10):
        budget.note(True, BLOCK, 3.0)
    assert budget.tokens(True) == BLOCK
    assert budget.tokens(False) > BLOCK, "steps of prompts alone have a target of their own"


def test_without_a_target_only_the_setting_counts() -> None:
    budget = made(0, 0)
    budget.note(False, MOST, 100.0)
    assert budget.tokens(True) == budget.tokens(False) == MOST


def test_a_limit_below_a_block_is_kept() -> None:
    assert StepBudget(8, BLOCK, 0.15, 0.5).tokens(True) == 8
