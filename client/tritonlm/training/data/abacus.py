"""Sums such as `123+456=579`: all pairs of numbers of one to three digits, some of them held out.

Token ids are computed with numpy, without a tokenizer: two million examples take a second.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..examples import IGNORED, Examples, Ids
from ..tokenizer import character_tokenizer
from . import Data

# 32 ids with the end of text. Prompts may contain the letters and the other signs; training does not.
CHARACTERS = "0123456789+=-*/ \nABCDEFGHIJKLMN"
HELD_OUT = 2000
HIGHEST = 999
_END, _PLUS, _EQUALS = 0, CHARACTERS.index("+") + 1, CHARACTERS.index("=") + 1
# The tokens of 999+999=1998 and the end of text.
_MAX_TOKENS = 13

Numbers = npt.NDArray[np.int64]


def load(seed: int = 0) -> Data:
    held_out, train = split(seed)
    return Data(
        "abacus",
        examples(*with_repeated_short_sums(*train)),
        examples(*held_out),
        character_tokenizer(CHARACTERS),
        f"all sums of two numbers from 0 to {HIGHEST} except {HELD_OUT} held-out ones",
        accuracy="held-out sums that are exact",
        prompts=["123+456=", "7+8=", "999+1=", "58+947="],
    )


def split(seed: int = 0) -> tuple[tuple[Numbers, Numbers], tuple[Numbers, Numbers]]:
    """The held-out pairs and the others, deterministic in the seed."""
    order = np.random.default_rng(seed).permutation((HIGHEST + 1) ** 2)
    first, second = order // (HIGHEST + 1), order % (HIGHEST + 1)
    return (first[:HELD_OUT], second[:HELD_OUT]), (first[HELD_OUT:], second[HELD_OUT:])


def with_repeated_short_sums(first: Numbers, second: Numbers) -> tuple[Numbers, Numbers]:
    """Repeat the short sums: only a hundred of a million pairs have one digit each."""
    larger = np.maximum(first, second)
    rows = [np.arange(len(first))]
    rows += [np.repeat(np.flatnonzero(larger < bound), times) for bound, times in ((100, 5), (10, 200))]
    selected = np.concatenate(rows)
    return first[selected], second[selected]


def examples(first: Numbers, second: Numbers) -> Examples:
    ids: Ids = np.zeros((len(first), _MAX_TOKENS), np.int32)
    column = _write_number(ids, np.zeros(len(first), np.int64), first)
    column = _write_sign(ids, column, _PLUS)
    column = _write_number(ids, column, second)
    answer = _write_sign(ids, column, _EQUALS)
    end = _write_number(ids, answer, first + second)
    columns = np.arange(_MAX_TOKENS)
    labelled = (columns >= answer[:, None]) & (columns <= end[:, None])
    return Examples(ids, np.where(labelled, ids, IGNORED).astype(np.int32))


def _write_number(ids: Ids, column: Numbers, number: Numbers) -> Numbers:
    """Write the digits of each row's number from its column on; return the columns after them."""
    digits = 1 + (number >= 10) + (number >= 100) + (number >= 1000)
    for position in range(int(digits.max())):
        rows = np.flatnonzero(position < digits)
        digit = number[rows] // 10 ** (digits[rows] - 1 - position) % 10
        ids[rows, column[rows] + position] = digit + 1
    return np.asarray(column + digits)


def _write_sign(ids: Ids, column: Numbers, token_id: int) -> Numbers:
    ids[np.arange(len(ids)), column] = token_id
    return column + 1
