"""The block pool of the KV cache: which sequence owns which block, and which blocks hold a reusable prefix.

Plain bookkeeping without tensors. A block is free, or referenced by sequences, or idle. An idle block is unreferenced
but holds a cached prefix. It stays until its space is needed (least recently used first).

The key of a published block is the content before it (as a serial number) and its own tokens. Serial numbers are never
reused, so two keys never collide, as hashes could. The children of an evicted block become unreachable and age out.

A sequence's chain of contents begins at a root: ROOT, or a serial number of its own for each adapter and cache salt, so
that their blocks are never matched by others.

At first only `usable` blocks may be used. When they do not suffice, the pool asks `grow` for more, which the owner of
the memory can refuse. A block is taken in this order: a released one; one that was never used; an idle one, by
eviction. So cached prefixes stay as long as granted memory is unused, and the pool grows only when the sequences alone
need more than eviction can free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

# The serial number of the empty content: the parent of a sequence's first block.
ROOT = 0
# Roots that are remembered. The blocks of a forgotten one cannot be matched any more and age out.
_KEPT_ROOTS = 4096
# Never owned and never written. Block tables are padded with it, so padding reads zeros.
PADDING_BLOCK = 0

Key = tuple[int, tuple[int, ...]]
# What requests must have in common to share blocks: the identity of the adapter, and the cache salt; empty for none.
PrefixKey = tuple[str, str]


@dataclass
class BlockTable:
    """The blocks of one sequence, in order. The first `published` of them can be matched by content."""

    blocks: list[int] = field(default_factory=list)
    published: int = 0
    content: int = ROOT


class BlockPool:
    def __init__(
        self, blocks: int, block_tokens: int, usable: int | None = None, grow: Callable[[int], int] | None = None
    ) -> None:
        """`grow(count)` requests `count` usable blocks in total, and returns how many are usable from now on."""
        assert min(blocks - 1, block_tokens) >= 1
        self.total = blocks - 1
        self.block_tokens = block_tokens
        self.usable = self.total if usable is None else min(usable, self.total)
        self._grow = grow
        # Blocks 1 to `touched` have been used at least once. `_free` holds the released ones, the latest at the end.
        self.touched = 0
        self._free: list[int] = []
        self._references = [0] * blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._content_of: dict[int, int] = {}
        self._last_content = ROOT
        self._roots: OrderedDict[PrefixKey, int] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be taken without growing: free ones, and idle ones by eviction."""
        return len(self._free) + self.usable - self.touched + len(self._idle)

    def has(self, count: int) -> bool:
        """Whether `count` blocks can be taken. Grow the pool if that is needed."""
        missing = count - self.available
        if 0 < missing <= self.total - self.usable and self._grow:
            self.usable = max(self.usable, min(self._grow(self.usable + missing), self.total))
        return count <= self.available

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.usable - self.available

    @property
    def idle(self) -> int:
        return len(self._idle)

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def key_after(self, table: BlockTable, ids: Sequence[int]) -> Key | None:
        """The key under which the table's next full block is, or will be, published; None past the last full one."""
        start = table.published * self.block_tokens
        tokens = tuple(ids[start : start + self.block_tokens])
        return (table.content, tokens) if len(tokens) == self.block_tokens else None

    def empty_table(self, key: PrefixKey = ("", "")) -> BlockTable:
        """A table without blocks, whose content begins at the root of this key."""
        if not any(key):
            return BlockTable()
        if key not in self._roots:
            self._last_content += 1
            self._roots[key] = self._last_content
            if len(self._roots) > _KEPT_ROOTS:
                self._roots.popitem(last=False)
        self._roots.move_to_end(key)
        return BlockTable(content=self._roots[key])

    def match(self, ids: Sequence[int], prefix_key: PrefixKey = ("", "")) -> BlockTable:
        """The longest cached prefix of `ids`, as a table whose blocks are not referenced yet (see `hold`).

        The last token is never matched: its logits have to be computed.
        """
        table = self.empty_table(prefix_key)
        while (key := self.key_after(table, ids)) and (table.published + 1) * self.block_tokens < len(ids):
            block = self._by_key.get(key)
            if block is None:
                break
            table.blocks.append(block)
            table.published += 1
            table.content = self._content_of[block]
        return table

    def hold(self, blocks: Iterable[int]) -> None:
        """Reference the blocks of a `match`."""
        for block in blocks:
            self._references[block] += 1
            self._idle.pop(block, None)

    def take(self, count: int) -> list[int]:
        """Take `count` blocks. The caller has checked that they are available."""
        assert count <= self.available
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self.touched < self.usable:
            # Low numbers first, so that unused blocks are contiguous at the end.
            self.touched += 1
            block = PADDING_BLOCK + self.touched
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block)
        del self._by_key[key]
        del self._content_of[block]

    def publish(self, table: BlockTable, ids: Sequence[int], computed: int) -> None:
        """Publish the table's full and computed blocks, so that they can be matched by content."""
        while (table.published + 1) * self.block_tokens <= computed:
            key = self.key_after(table, ids)
            assert key is not None
            block = table.blocks[table.published]
            twin = self._by_key.get(key)
            if twin is None:
                self._last_content += 1
                self._by_key[key] = block
                self._key_of[block] = key
                self._content_of[block] = self._last_content
                twin = block
            # If another sequence published the content first, this block stays private and takes its serial number.
            table.content = self._content_of[twin]
            table.published += 1

    def unpublish(self, table: BlockTable) -> list[int]:
        """Unpublish the blocks that only this table references, and return them. When it is released they are free."""
        own = [block for block in table.blocks if self._references[block] == 1]
        for block in own:
            if block in self._key_of:
                self._forget(block)
        return own

    def release(self, table: BlockTable) -> None:
        """Release the table's blocks. The tail goes first, so that it is evicted before its prefix."""
        for block in reversed(table.blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        table.blocks, table.published, table.content = [], 0, ROOT

    def forget_idle(self) -> None:
        """Drop every idle prefix. After a failed step the content of the cache is uncertain."""
        for block in list(self._idle):
            self._forget(block)
            self._free.append(block)
        self._idle.clear()

    def check(self) -> None:
        """Assert the invariants: every block that was ever used is either free, idle or referenced."""
        referenced = {block for block, count in enumerate(self._references) if count}
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free)
        assert not (free & idle) | (free & referenced) | (idle & referenced)
        assert 0 <= self.touched <= self.usable <= self.total
        assert free | idle | referenced == set(range(PADDING_BLOCK + 1, PADDING_BLOCK + 1 + self.touched))
        assert self.used == len(referenced)
        assert self.used + self.available == self.usable
        assert PADDING_BLOCK not in free | idle | referenced
        assert idle <= self._key_of.keys()
        assert self._key_of.keys() == self._content_of.keys()
        assert {key: block for block, key in self._key_of.items()} == self._by_key
