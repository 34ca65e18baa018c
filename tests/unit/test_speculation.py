"""Prompt lookup and the speculation gate: which draft tokens are proposed, how many, and when none are."""

from __future__ import annotations

from engine.scheduling.speculation import PromptLookup, SpeculationGate
from hypothesis import given
from hypothesis import strategies as st


def confident_lookup(max_draft_tokens: int = 8) -> PromptLookup:
    """A lookup that proposes its maximum, because its drafts were accepted before."""
    lookup = PromptLookup(max_draft_tokens)
    for _ in range(4):
        lookup.record(1, 1)
    return lookup


def test_the_tokens_after_the_latest_match_are_proposed() -> None:
    assert confident_lookup().propose([1, 2, 3, 4, 5, 6, 1, 2, 3], 3) == (4, 5, 6)
    # A match of three tokens goes before one of two; among equal matches the latest wins.
    assert confident_lookup().propose([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 1) == (7,)
    assert confident_lookup().propose([2, 3, 7, 2, 3, 8, 2, 3], 1) == (8,)
    assert confident_lookup().propose([1, 2, 3, 4], 3) == ()


def test_a_draft_beyond_the_end_repeats_the_text() -> None:
    assert confident_lookup().propose([1, 2, 1, 2, 1], 5) == (2, 1, 2, 1, 2)
    assert confident_lookup().propose([4, 4, 4, 4], 3) == (4, 4, 4)


def test_acceptance_doubles_the_draft_length_and_rejection_backs_off() -> None:
    text, lookup = [1, 2, 3] * 20, PromptLookup(8)
    counts = []
    for _ in range(4):
        counts.append(len(lookup.propose(text, 99)))
        lookup.record(counts[-1], counts[-1])
    assert counts == [2, 4, 8, 8]
    lookup.record(8, 3)
    assert len(lookup.propose(text, 99)) == 3
    backoffs = []
    for _ in range(9):
        lookup.record(1, 0)
        before = len(text)
        while not lookup.propose(text, 99):
            text.append((1, 2, 3)[len(text) % 3])
        backoffs.append(len(text) - before)
    assert backoffs == [1, 2, 4, 8, 16, 32, 64, 64, 64]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 10), st.integers(1, 8))
def test_a_draft_consists_of_known_tokens_and_keeps_the_limits(ids: list[int], limit: int, most: int) -> None:
    lookup, known = confident_lookup(most), []
    for token in ids:
        known.append(token)
        draft = lookup.propose(known, limit)
        assert len(draft) <= min(limit, most)
        assert set(draft) <= set(known)


@given(st.floats(0.1, 0.95) | st.floats(1.05, 10), st.integers(1, 16))
def test_the_gate_opens_where_drafts_raise_the_throughput(gain: float, batch_size: int) -> None:
    gate, decisions = SpeculationGate(), []
    for _ in range(3 * 128):
        decisions.append(gate.is_open(batch_size))
        gate.record(batch_size, decisions[-1], batch_size * (gain if decisions[-1] else 1.0), 0.01)
    for cycle in range(3):
        trials, rest = decisions[128 * cycle :][:16], decisions[128 * cycle + 16 : 128 * (cycle + 1)]
        assert trials == [True] * 8 + [False] * 8
        assert set(rest) == {gain >= 1}


def test_the_gate_adapts_over_time_and_by_batch_size() -> None:
    gate = SpeculationGate()

    def is_open_after(batch_size: int, gain: float, cycles: int) -> bool:
        decision = False
        for _ in range(128 * cycles):
            decision = gate.is_open(batch_size)
            gate.record(batch_size, decision, gain if decision else 1.0, 0.01)
        return decision

    assert is_open_after(1, 2.0, 1)
    assert not is_open_after(8, 0.5, 1)
    assert is_open_after(1, 2.0, 1)
    assert not is_open_after(1, 0.5, 4)
