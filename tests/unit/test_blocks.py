"""The block pool: ownership of blocks, and reuse of prefixes."""

from __future__ import annotations

import pytest
from engine.scheduling.blocks import PADDING_BLOCK, BlockPool, BlockTable, PrefixKey
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 4


def filled(pool: BlockPool, ids: list[int], key: PrefixKey = ("", "")) -> BlockTable:
    """A sequence whose tokens are all computed and published."""
    table = pool.match(ids, key)
    pool.hold(table.blocks)
    table.blocks += pool.take(pool.blocks_for(len(ids)) - len(table.blocks))
    pool.publish(table, ids, len(ids))
    pool.check()
    return table


def test_a_prefix_matches_by_full_blocks_and_never_whole() -> None:
    pool = BlockPool(9, BLOCK)
    ids = list(range(10))
    blocks = list(filled(pool, ids).blocks)
    assert pool.match([*ids, 99]).blocks == blocks[:2]
    assert pool.match(ids[:8]).blocks == blocks[:1], "the last token's logits have to be computed"
    assert pool.match([99, *ids]).blocks == []
    assert PADDING_BLOCK not in blocks


def test_the_same_tokens_after_another_prefix_do_not_match() -> None:
    pool = BlockPool(9, BLOCK)
    filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.match([9, 9, 9, 9, 5, 6, 7, 8, 9]).blocks == []


def test_each_adapter_and_salt_has_prefixes_of_its_own() -> None:
    pool = BlockPool(30, BLOCK)
    ids = list(range(9))
    keys = [("", ""), ("adapter", ""), ("", "salt"), ("adapter", "salt"), ("salt", "")]
    held = [filled(pool, ids, key) for key in keys]
    assert len({block for table in held for block in table.blocks}) == 3 * len(keys)
    for key, table in zip(keys, held, strict=True):
        assert pool.match(ids, key).blocks == table.blocks[:2]
    assert pool.match(ids, ("other", "")).blocks == []


def test_a_forgotten_root_is_a_prefix_that_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.scheduling.blocks._KEPT_ROOTS", 2)
    pool = BlockPool(30, BLOCK)
    ids = list(range(9))
    tables = {salt: filled(pool, ids, ("", salt)) for salt in "ab"}
    assert pool.match(ids, ("", "a")).blocks == tables["a"].blocks[:2]
    filled(pool, ids, ("", "c"))
    assert pool.match(ids, ("", "a")).blocks == tables["a"].blocks[:2], "the least recently used root goes"
    assert pool.match(ids, ("", "b")).blocks == []
    for table in tables.values():
        pool.release(table)
    pool.check()


def test_idle_blocks_are_evicted_oldest_and_deepest_first() -> None:
    pool = BlockPool(5, BLOCK)
    first, second = [1] * 8 + [0], [2] * 4 + [0]
    for ids in (first, second):
        pool.release(filled(pool, ids[:-1]))
    assert (pool.used, pool.idle, pool.available) == (0, 3, 4)
    pool.take(2)
    # The free block and the tail of the oldest prefix are taken. Its head and the newer prefix are still cached.
    assert len(pool.match(first).blocks) == 1
    assert len(pool.match(second).blocks) == 1
    pool.check()


def test_a_matched_block_is_not_evicted_while_it_is_held() -> None:
    pool = BlockPool(3, BLOCK)
    ids = [1] * 4 + [0]
    pool.release(filled(pool, ids[:-1]))
    table = pool.match(ids)
    pool.hold(table.blocks)
    assert pool.available == 1
    assert pool.take(1) != table.blocks
    pool.release(table)
    assert pool.match(ids).blocks


def test_two_sequences_of_equal_content_keep_their_blocks_and_share_the_content() -> None:
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


def test_forget_idle_drops_all_prefixes() -> None:
    pool = BlockPool(9, BLOCK)
    pool.release(filled(pool, [1, 2, 3, 4, 5]))
    pool.forget_idle()
    pool.check()
    assert pool.match([1, 2, 3, 4, 5]).blocks == []
    assert pool.available == pool.total


def test_unpublish_drops_the_blocks_that_no_other_sequence_references() -> None:
    pool = BlockPool(9, BLOCK)
    kept, failed = filled(pool, [1] * 8 + [2]), filled(pool, [1] * 8 + [3] * 4)
    assert failed.blocks[:2] == kept.blocks[:2]
    own = pool.unpublish(failed)
    assert own == failed.blocks[2:]
    pool.check()
    pool.release(failed)
    pool.check()
    assert pool.match([1] * 8 + [3] * 5).blocks == kept.blocks[:2]
    assert pool.idle == 0
    assert pool.take(1) == own


def test_taking_more_than_available_fails() -> None:
    pool = BlockPool(3, BLOCK)
    with pytest.raises(AssertionError):
        pool.take(3)


def test_an_evicted_content_never_matches_a_new_one() -> None:
    pool = BlockPool(7, BLOCK)
    heads = [BlockTable(pool.take(1)) for _ in range(2)]
    for number, head in enumerate(heads):
        pool.publish(head, [number] * 4, 4)
    # Its first block has the content of a head and stays private; the others are published after that content.
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


def test_released_blocks_are_taken_before_unused_and_idle_ones() -> None:
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


def test_the_pool_grows_only_if_eviction_does_not_suffice() -> None:
    requested: list[int] = []

    def grow(usable: int) -> int:
        requested.append(usable)
        return usable + 1

    pool = BlockPool(9, BLOCK, usable=3, grow=grow)
    pool.release(filled(pool, [1] * 8))
    assert pool.has(3)
    assert not pool.has(9), "more blocks than the pool has"
    assert requested == []
    assert pool.has(4)
    assert (requested, pool.usable) == ([4], 5)
    pool.take(5)
    assert (pool.used, pool.available, pool.idle) == (5, 0, 0)
    assert pool.has(3), "at most the whole pool, whatever is granted"
    assert (requested, pool.usable) == ([4, 8], 8)
    pool.check()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.lists(st.integers(0, 1), min_size=1, max_size=30)),
            st.tuples(st.sampled_from(("release", "fail")), st.integers(0, 20)),
            st.just("forget"),
        ),
        max_size=60,
    ),
    st.integers(1, 20),
    st.integers(1, 20),
    st.lists(st.integers(0, 9)),
)
def test_the_invariants_hold_under_random_growth(
    events: list[tuple[str, list[int]] | tuple[str, int] | str], blocks: int, usable: int, grants: list[int]
) -> None:
    """`grants`: how many more blocks each call of `grow` grants."""
    granted = min(usable, blocks)

    def grow(count: int) -> int:
        nonlocal granted
        assert granted < count <= blocks
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
            table = tables.pop(event[1] % len(tables))
            if event[0] == "fail":
                pool.unpublish(table)
            pool.release(table)
        pool.check()
        most_used = max(most_used, pool.used)
        assert pool.usable == min(granted, blocks)
        assert most_used <= pool.touched <= pool.usable
    for table in tables:
        pool.release(table)
    assert (pool.used, pool.available) == (0, pool.usable)
    pool.check()
