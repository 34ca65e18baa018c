"""Sums in plain order, `123+456=579`: all pairs of numbers of one to three digits, some held out.

Token ids are computed here, without a tokenizer: two million texts are made in a second.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..examples import IGNORED, Examples, Ids
from ..tokenizer import character_tokenizer
from . import Data

# With the end of text 32 ids. The letters and signs are there to be asked about, and never learnt.
CHARACTERS = "0123456789+=-*/ \nABCDEFGHIJKLMN"
HELD_OUT = 2000
HIGHEST = 999
_END, _PLUS, _EQUALS = 0, CHARACTERS.index("+") + 1, CHARACTERS.index("=") + 1
# 999+999=1998 and the end.
_LONGEST = 13

Numbers = npt.NDArray[np.int64]


def load(seed: int = 0) -> Data:
    held_out, train = split(seed)
    return Data(
        "abacus",
        examples(*with_short_ones(*train)),
        examples(*held_out),
        character_tokenizer(CHARACTERS),
        f"all sums of two numbers from 0 to {HIGHEST} but {HELD_OUT} that are held out",
        accuracy="held-out sums that are exact",
        prompts=["123+456=", "7+8=", "999+1=", "58+947="],
    )


def split(seed: int = 0) -> tuple[tuple[Numbers, Numbers], tuple[Numbers, Numbers]]:
    """The held-out pairs and the others, the same for the same seed."""
    order = np.random.default_rng(seed).permutation((HIGHEST + 1) ** 2)
    first, second = order // (HIGHEST + 1), order % (HIGHEST + 1)
    return (first[:HELD_OUT], second[:HELD_OUT]), (first[HELD_OUT:], second[HELD_OUT:])


def with_short_ones(first: Numbers, second: Numbers) -> tuple[Numbers, Numbers]:
    """The short sums more often: among a million pairs, those of one digit are a hundred."""
    larger = np.maximum(first, second)
    rows = [np.arange(len(first))]
    rows += [np.repeat(np.flatnonzero(larger < bound), times) for bound, times in ((100, 5), (10, 200))]
    chosen = np.concatenate(rows)
    return first[chosen], second[chosen]


def examples(first: Numbers, second: Numbers) -> Examples:
    ids: Ids = np.zeros((len(first), _LONGEST), np.int32)
    place = _write(ids, np.zeros(len(first), np.int64), first)
    place = _sign(ids, place, _PLUS)
    place = _write(ids, place, second)
    answer = _sign(ids, place, _EQUALS)
    end = _write(ids, answer, first + second)
    columns = np.arange(_LONGEST)
    learnt = (columns >= answer[:, None]) & (columns <= end[:, None])
    return Examples(ids, np.where(learnt, ids, IGNORED).astype(np.int32))


def _write(ids: Ids, place: Numbers, number: Numbers) -> Numbers:
    """Write each number's digits from its place on; the places after them."""
    digits = 1 + (number >= 10) + (number >= 100) + (number >= 1000)
    for position in range(int(digits.max())):
        rows = np.flatnonzero(position < digits)
        digit = number[rows] // 10 ** (digits[rows] - 1 - position) % 10
        ids[rows, place[rows] + position] = digit + 1
    return np.asarray(place + digits)


def _sign(ids: Ids, place: Numbers, token_id: int) -> Numbers:
    ids[np.arange(len(ids)), place] = token_id
    return place + 1
