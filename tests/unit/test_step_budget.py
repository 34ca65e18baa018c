"""The step budget follows the measured speed up and down, and never below one block."""

from __future__ import annotations

from engine.scheduling.step_budget import StepBudget
from hypothesis import given
from hypothesis import strategies as st

BLOCK, MOST = 16, 512


def make_budget(decode_seconds: float = 0.15, prefill_seconds: float = 0.5) -> StepBudget:
    return StepBudget(MOST, BLOCK, decode_seconds, prefill_seconds)


@given(
    fixed=st.floats(0, 0.1),
    token_seconds=st.floats(1e-6, 0.02),
    decoding=st.booleans(),
)
def test_the_budget_converges_to_the_target_time(fixed: float, token_seconds: float, decoding: bool) -> None:
    budget, target = make_budget(), 0.15 if decoding else 0.5
    for _ in range(40):
        tokens = budget.tokens(decoding)
        budget.record(decoding, tokens, fixed + tokens * token_seconds)
    tokens = budget.tokens(decoding)
    assert BLOCK <= tokens <= MOST
    if tokens > BLOCK:
        assert fixed + tokens * token_seconds <= target * 1.05
    if tokens < MOST:
        # Close to the largest number of tokens that fits, as far as the fixed time of a step allows.
        assert fixed + (tokens + 2) * token_seconds > target * 0.9


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2000), st.floats(0, 100))))
def test_the_budget_stays_between_one_block_and_the_maximum(steps: list[tuple[bool, int, float]]) -> None:
    budget = make_budget()
    for decoding, tokens, seconds in steps:
        budget.record(decoding, tokens, seconds)
        assert all(BLOCK <= budget.tokens(mode) <= MOST for mode in (True, False))


def test_a_step_below_the_budget_does_not_raise_it() -> None:
    budget = make_budget()
    before = budget.tokens(True)
    budget.record(True, before - 1, 0.001)
    assert budget.tokens(True) == before
    budget.record(True, before, 0.001)
    assert budget.tokens(True) > before


def test_a_slow_step_lowers_the_budget_even_if_it_was_not_full() -> None:
    budget = make_budget()
    for _ in range(10):
        budget.record(True, BLOCK, 3.0)
    assert budget.tokens(True) == BLOCK
    assert budget.tokens(False) > BLOCK, "steps with prompts only have a separate target"


def test_a_prompt_slows_fast_streams_less_than_the_target_allows() -> None:
    budget = make_budget()
    for _ in range(40):
        budget.record(True, 0, 0.05)
        tokens = budget.tokens(True)
        budget.record(True, tokens, 0.05 + tokens * 0.001)
    assert 0.05 + budget.tokens(True) * 0.001 <= 2 * 0.05, "less than twice a step without prompts"
    for _ in range(40):
        budget.record(True, 0, 0.001)
        tokens = budget.tokens(True)
        budget.record(True, tokens, 0.001 + tokens * 0.001)
    assert 0.07 < 0.001 + budget.tokens(True) * 0.001 < 0.08, "a pause that nobody notices"


def test_without_a_target_the_budget_is_the_setting() -> None:
    budget = make_budget(0, 0)
    budget.record(False, MOST, 100.0)
    assert budget.tokens(True) == budget.tokens(False) == MOST


def test_a_limit_below_a_block_is_kept() -> None:
    assert StepBudget(8, BLOCK, 0.15, 0.5).tokens(True) == 8
