"""The block pool: who owns which block, and which prefix is found again."""

from __future__ import annotations

import pytest
from engine.scheduling.blocks import PADDING_BLOCK, BlockPool, BlockTable
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 4


def filled(pool: BlockPool, ids: list[int]) -> BlockTable:
    """A sequence whose tokens are all computed and known."""
    table = pool.match(ids)
    pool.hold(table.blocks)
    table.blocks += pool.take(pool.blocks_for(len(ids)) - len(table.blocks))
    pool.publish(table, ids, len(ids))
    pool.check()
    return table


def test_a_prefix_is_found_again_by_full_blocks_and_never_whole() -> None:
    pool = BlockPool(9, BLOCK)
    ids = list(range(10))
    blocks = list(filled(pool, ids).blocks)
    assert pool.match([*ids, 99]).blocks == blocks[:2]
    assert pool.match(ids[:8]).blocks == blocks[:1], "the last token's logits have to be computed"
    assert pool.match([99, *ids]).blocks == []
    assert PADDING_BLOCK not in blocks


def test_the_same_tokens_after_another_beginning_are_another_content() -> None:
    pool = BlockPool(9, BLOCK)
    filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.match([9, 9, 9, 9, 5, 6, 7, 8, 9]).blocks == []


def test_released_blocks_stay_known_until_they_are_needed_oldest_and_deepest_first() -> None:
    pool = BlockPool(5, BLOCK)
    first, second = [1] * 8 + [0], [2] * 4 + [0]
    for ids in (first, second):
        pool.release(filled(pool, ids[:-1]))
    assert (pool.used, pool.idle, pool.available) == (0, 3, 4)
    pool.take(2)
    # The free one and the tail of the oldest prefix are gone; its head and the younger prefix are still there.
    assert len(pool.match(first).blocks) == 1
    assert len(pool.match(second).blocks) == 1
    pool.check()


def test_a_found_block_is_not_evicted_while_it_is_held() -> None:
    pool = BlockPool(3, BLOCK)
    ids = [1] * 4 + [0]
    pool.release(filled(pool, ids[:-1]))
    table = pool.match(ids)
    pool.hold(table.blocks)
    assert pool.available == 1
    assert pool.take(1) != table.blocks
    pool.release(table)
    assert pool.match(ids).blocks


def test_twins_keep_their_own_blocks_and_one_content() -> None:
    pool = BlockPool(9, BLOCK)
    ids = [1, 2, 3, 4, 5]
    tables = [BlockTable(pool.take(2)) for _ in range(2)]
    for table in tables:
        pool.publish(table, ids, len(ids))
    assert tables[0].content == tables[1].content
    assert not set(tables[0].blocks) & set(tables[1].blocks)
    pool.release(tables[0])
    pool.release(tables[1])
    pool.check()
    assert pool.idle == 1


def test_after_a_failure_nothing_is_remembered() -> None:
    pool = BlockPool(9, BLOCK)
    pool.release(filled(pool, [1, 2, 3, 4, 5]))
    pool.forget_idle()
    pool.check()
    assert pool.match([1, 2, 3, 4, 5]).blocks == []
    assert pool.available == pool.total


def test_more_than_there_is_cannot_be_taken() -> None:
    pool = BlockPool(3, BLOCK)
    with pytest.raises(AssertionError):
        pool.take(3)


def test_a_content_that_is_forgotten_is_never_taken_for_a_new_one() -> None:
    pool = BlockPool(7, BLOCK)
    heads = [BlockTable(pool.take(1)) for _ in range(2)]
    for number, head in enumerate(heads):
        pool.publish(head, [number] * 4, 4)
    # Its first block is a twin of a head and stays private; the others are known by what the head holds.
    chain = BlockTable(pool.take(3))
    pool.publish(chain, [0] * 4 + [2] * 4 + [3] * 4, 12)
    for head in heads:
        pool.release(head)
    taken = pool.take(3)
    assert pool.match([0] * 9).blocks == [], "the head has been evicted"
    other = BlockTable([taken[0]])
    pool.publish(other, [4] * 4, 4)
    for child in (2, 3):
        assert pool.match([4] * 4 + [child] * 4 + [0]).blocks == [taken[0]]
    pool.check()


def test_a_released_block_is_taken_before_an_unused_one_and_a_known_one_last() -> None:
    pool = BlockPool(9, BLOCK, usable=4)
    known, plain = filled(pool, [1] * 4), BlockTable(pool.take(1))
    released = list(plain.blocks)
    pool.release(known)
    pool.release(plain)
    assert pool.take(1) == released
    assert (pool.take(2), pool.touched, pool.idle) == ([3, 4], 4, 1)
    assert (pool.available, pool.has(2)) == (1, False)
    pool.take(1)
    assert pool.match([1] * 5).blocks == []
    pool.check()


def test_it_grows_only_where_eviction_does_not_suffice_and_that_helps() -> None:
    requested: list[int] = []

    def grow(usable: int) -> int:
        requested.append(usable)
        return usable + 1

    pool = BlockPool(9, BLOCK, usable=3, grow=grow)
    pool.release(filled(pool, [1] * 8))
    assert pool.has(3)
    assert not pool.has(9), "more than there is in all"
    assert requested == []
    assert pool.has(4)
    assert (requested, pool.usable) == ([4], 5)
    pool.take(5)
    assert (pool.used, pool.available, pool.idle) == (5, 0, 0)
    assert pool.has(3), "no more than the whole pool, whatever is granted"
    assert (requested, pool.usable) == ([4, 8], 8)
    pool.check()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.lists(st.integers(0, 1), min_size=1, max_size=30)),
            st.tuples(st.just("release"), st.integers(0, 20)),
            st.just("forget"),
        ),
        max_size=60,
    ),
    st.integers(1, 20),
    st.integers(1, 20),
    st.lists(st.integers(0, 9)),
)
def test_the_invariants_hold_however_it_may_grow(
    events: list[tuple[str, list[int]] | tuple[str, int] | str], blocks: int, usable: int, grants: list[int]
) -> None:
    """`grants`: how many blocks more than nothing the owner of the memory grants each time."""
    granted = min(usable, blocks)

    def grow(wanted: int) -> int:
        nonlocal granted
        assert granted < wanted <= blocks
        granted += grants.pop() if grants else 0
        return granted

    pool, tables, most_used = BlockPool(blocks + 1, BLOCK, usable, grow), list[BlockTable](), 0
    for event in events:
        if event == "forget":
            pool.forget_idle()
        elif event[0] == "take" and isinstance(event[1], list):
            ids = event[1]
            table = pool.match(ids)
            pool.hold(table.blocks)
            count = pool.blocks_for(len(ids)) - len(table.blocks)
            if pool.has(count):
                table.blocks += pool.take(count)
                pool.publish(table, ids, len(ids))
                tables.append(table)
            else:
                pool.release(table)
        elif tables and isinstance(event[1], int):
            pool.release(tables.pop(event[1] % len(tables)))
        pool.check()
        most_used = max(most_used, pool.used)
        assert pool.usable == min(granted, blocks)
        assert most_used <= pool.touched <= pool.usable
    for table in tables:
        pool.release(table)
    assert (pool.used, pool.available) == (0, pool.usable)
    pool.check()
