"""Memory of large pages: what is taken, given back and used again."""

from __future__ import annotations

import resource

import torch
from engine.memory import resident_memory
from engine.runners.native.large_pages import KeptRows, LargePages, Scratch
from hypothesis import given
from hypothesis import strategies as st

MIB = 1 << 20
SIZES = st.sampled_from((1, 4095, 131_071, 131_072, 200_000, 5 * MIB, 70 * MIB))


@given(st.lists(st.tuples(SIZES, st.booleans()), max_size=12))
def test_pieces_are_zeros_that_nobody_else_has(wanted: list[tuple[int, bool]]) -> None:
    pages, kept = LargePages(), list[torch.Tensor]()
    for number, (size, is_returned) in enumerate(wanted, 1):
        piece = pages.zeros(size)
        assert len(piece) == size
        ends = piece[[0, size // 2, -1]]
        assert not ends.any()
        piece[[0, size // 2, -1]] = number
        if is_returned:
            pages.give_back(piece)
        else:
            kept.append(piece)
    assert [int(piece[0]) for piece in kept] == [n for n, (_, back) in enumerate(wanted, 1) if not back]
    assert all(piece[0] == piece[-1] for piece in kept)


def test_a_piece_that_is_given_back_is_used_again() -> None:
    pages = LargePages()
    pages.zeros(MIB)
    first = pages.zeros(3 * MIB)
    address = first.data_ptr()
    pages.give_back(first)
    assert pages.zeros(MIB).data_ptr() == address


def test_scratch_is_the_same_memory_until_more_is_needed() -> None:
    scratch = Scratch()
    before = resident_memory()
    for _ in range(8):
        scratch.take(32 * MIB).fill_(1)
    assert resident_memory() - before < 40 * MIB
    assert scratch.take(1000).data_ptr() == scratch.take(MIB).data_ptr()
    larger = scratch.take(48 * MIB)
    assert len(larger) == 48 * MIB
    assert not larger.any()


def test_rows_of_a_large_vocabulary_take_no_new_memory_at_each_step() -> None:
    kept = KeptRows(262_144)
    kept.rows(36).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        assert kept.rows(36).fill_(2).shape == (36, 262_144)
    # 9,216 for each step in memory that is new.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000
    assert kept.rows(0).shape == (0, 262_144)
    first = kept.rows(1)
    assert kept.rows(72).data_ptr() == first.data_ptr() != kept.rows(73).data_ptr()
