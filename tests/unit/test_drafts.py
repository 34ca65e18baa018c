"""Guesses from a text's own past: the latest run wins, whoever is wrong rests, and none is longer than asked for."""

from __future__ import annotations

from engine.scheduling.speculation import Lookup, Trial
from hypothesis import given
from hypothesis import strategies as st


def trusting(most: int = 8) -> Lookup:
    lookup = Lookup(most)
    for _ in range(4):
        lookup.judge(1, 1)
    return lookup


def test_what_followed_the_last_tokens_before_is_guessed_again() -> None:
    assert trusting().guess([1, 2, 3, 4, 5, 6, 1, 2, 3], 3) == (4, 5, 6)
    # Three tokens that match tell more than two; of equals the later one counts.
    assert trusting().guess([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 1) == (7,)
    assert trusting().guess([2, 3, 7, 2, 3, 8, 2, 3], 1) == (8,)
    assert trusting().guess([1, 2, 3, 4], 3) == ()


def test_where_the_text_ends_it_is_taken_to_repeat_itself() -> None:
    assert trusting().guess([1, 2, 1, 2, 1], 5) == (2, 1, 2, 1, 2)
    assert trusting().guess([4, 4, 4, 4], 3) == (4, 4, 4)


def test_who_is_right_guesses_more_and_who_is_wrong_rests() -> None:
    text, lookup = [1, 2, 3] * 20, Lookup(8)
    counts = []
    for _ in range(4):
        counts.append(len(lookup.guess(text, 99)))
        lookup.judge(counts[-1], counts[-1])
    assert counts == [2, 4, 8, 8]
    lookup.judge(8, 3)
    assert len(lookup.guess(text, 99)) == 3
    rests = []
    for _ in range(9):
        lookup.judge(1, 0)
        before = len(text)
        while not lookup.guess(text, 99):
            text.append((1, 2, 3)[len(text) % 3])
        rests.append(len(text) - before)
    assert rests == [1, 2, 4, 8, 16, 32, 64, 64, 64]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 10), st.integers(1, 8))
def test_a_guess_stands_in_the_text_and_has_its_room(ids: list[int], room: int, most: int) -> None:
    lookup, known = trusting(most), []
    for token in ids:
        known.append(token)
        guess = lookup.guess(known, room)
        assert len(guess) <= min(room, most)
        assert set(guess) <= set(known)


@given(st.floats(0.1, 0.95) | st.floats(1.05, 10), st.integers(1, 16))
def test_guesses_are_made_where_they_pay_by_the_clock(gain: float, crowd: int) -> None:
    trial, ways = Trial(), []
    for _ in range(3 * 128):
        ways.append(trial.wants(crowd))
        trial.note(crowd, ways[-1], crowd * (gain if ways[-1] else 1.0), 0.01)
    for cycle in range(3):
        both, rest = ways[128 * cycle :][:16], ways[128 * cycle + 16 : 128 * (cycle + 1)]
        assert both == [True] * 8 + [False] * 8
        assert set(rest) == {gain >= 1}


def test_what_pays_may_change_and_differs_by_the_number_of_requests() -> None:
    trial = Trial()

    def kept(crowd: int, gain: float, cycles: int) -> bool:
        way = False
        for _ in range(128 * cycles):
            way = trial.wants(crowd)
            trial.note(crowd, way, gain if way else 1.0, 0.01)
        return way

    assert kept(1, 2.0, 1)
    assert not kept(8, 0.5, 1)
    assert kept(1, 2.0, 1)
    assert not kept(1, 0.5, 4)
