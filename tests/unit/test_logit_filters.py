"""Temperature, top-k, top-p and min-p sample what transformers' filters leave, with random numbers that are uniform."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from engine.sampling.logit_filters import SamplingSettings, sample_tokens
from engine.sampling.sampler import uniform
from fakes.sampling import VOCABULARY, some_logits, state
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from tritonlm.contract import SamplingParameters

SAMPLES = 20_000
FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.6, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.8, "top_k": 12, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.04},
    {"top_k": -1, "top_p": 1.0, "min_p": 0.0},
    {"top_k": 10_000},
]


def filtered(logits: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """One row's probabilities after transformers' warpers, in the order in which `generate` applies them."""
    params = SamplingParameters(**parameters)
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    scores: torch.Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())
    return scores.double().softmax(-1)[0]


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The probability of a deviation at least this large. Rare outcomes are grouped."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    grouped = torch.cat([expected[common], expected[~common].sum()[None]])
    if grouped[-1] < 5:
        observed, grouped = observed[:-1], grouped[:-1]
    if len(grouped) < 2:
        return 1.0
    statistic = ((observed - grouped) ** 2 / grouped).sum()
    freedom = torch.tensor((len(grouped) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def count_samples(logits: torch.Tensor, parameters: dict[str, Any]) -> torch.Tensor:
    """How often each token is sampled at positions 0, 1, 2 … of one sequence."""
    one = state(seed=11, vocabulary=len(logits), **parameters)
    counts = torch.zeros(len(logits))
    batch = 1000
    for start in range(0, SAMPLES, batch):
        uniforms = uniform([11] * batch, [0] * batch, range(start, start + batch))
        tokens = sample_tokens(logits.expand(batch, -1), [one.settings] * batch, uniforms)
        counts += torch.bincount(tokens, minlength=len(logits))
    return counts


@pytest.mark.parametrize("parameters", FILTERS, ids=str)
def test_samples_follow_the_filtered_distribution(parameters: dict[str, Any]) -> None:
    logits = some_logits(1)[0]
    probabilities = filtered(logits, parameters)
    counts = count_samples(logits, parameters)
    assert not counts[probabilities == 0].any()
    assert chi_square_p(counts, probabilities) > 0.001


def test_the_chi_square_test_can_fail() -> None:
    logits = some_logits(1)[0]
    assert chi_square_p(count_samples(logits, {"temperature": 1.0}), filtered(logits, {"temperature": 1.05})) < 0.001


def kept(logits: torch.Tensor, parameters: dict[str, Any]) -> set[int]:
    """The tokens that a fine grid of uniform numbers can sample."""
    one = state(vocabulary=len(logits), **parameters)
    grid = (np.arange(4000) + 0.5) / 4000
    return set(sample_tokens(logits.expand(len(grid), -1), [one.settings] * len(grid), grid).tolist())


@pytest.mark.parametrize("parameters", FILTERS, ids=str)
def test_the_number_of_kept_ties_is_that_of_transformers(parameters: dict[str, Any]) -> None:
    """With few distinct logits every filter limit falls among ties. Which of them stay depends on torch's sort."""
    for seed in range(30):
        logits = torch.randint(0, 4, (VOCABULARY,), generator=torch.Generator().manual_seed(seed)).float()
        expected = logits[filtered(logits, parameters) > 0]
        assert logits[sorted(kept(logits, parameters))].sort().values.tolist() == expected.sort().values.tolist()


@pytest.mark.parametrize(("parameters", "count", "expected"), [
    ({"top_p": 0.9}, 10, set(range(1, 10))),
    ({"top_p": 0.5}, 4, {2, 3}),
    ({"top_p": 1e-9}, 10, {9}),
    ({"top_k": 3}, 10, set(range(10))),
    ({"min_p": 1.0}, 10, set(range(10))),
])  # fmt: skip
def test_ties(parameters: dict[str, Any], count: int, expected: set[int]) -> None:
    assert kept(torch.zeros(count), parameters) == expected
    assert len(expected) == int((filtered(torch.zeros(count), parameters) > 0).sum())


def test_the_sample_is_the_first_token_whose_cumulative_weight_exceeds_the_uniform() -> None:
    tokens = sample_tokens(
        torch.zeros(3, 2), [SamplingSettings(1.0, 0, 1.0, 0.0)] * 3, np.array([0.4999999, 0.5, 0.5000001])
    )
    assert tokens.tolist() == [0, 1, 1]


def test_top_p_searches_beyond_the_first_candidates() -> None:
    logits = some_logits(1, vocabulary=5000, spread=0.5)[0]
    reference = filtered(logits, {"top_p": 0.7})
    one = SamplingSettings(1.0, 0, 0.7, 0.0)
    first, last = reference.nonzero()[0], reference.nonzero()[-1]
    tokens = sample_tokens(logits.expand(2, -1), [one, one], np.array([1e-12, 1 - 1e-12]))
    assert tokens.tolist() == [int(first), int(last)]


def test_minus_infinity_is_never_sampled() -> None:
    logits = some_logits(1)[0]
    logits[::2] = -math.inf
    assert all(token % 2 for token in kept(logits, {"top_p": 0.99}))
    assert all(token % 2 for token in kept(logits, {}))
    assert sample_tokens(logits[None], [state().settings], np.array([2.0**-53])).tolist() == [1]


def correlation(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    return float(np.corrcoef(left, right)[0, 1])


def test_random_numbers_are_uniform_and_independent() -> None:
    count = 100_000
    still = [0] * count
    seeds = range(-count // 2, count // 2)
    for numbers in (
        uniform([42] * count, still, range(count)),
        uniform(seeds, still, still),
        uniform(seeds, still, range(count)),
        uniform([7] * count, range(count), still),
    ):
        assert numbers.dtype == np.float64
        assert numbers.min() > 0
        assert numbers.max() < 1
        counts = torch.from_numpy(np.histogram(numbers, bins=200, range=(0, 1))[0])
        assert chi_square_p(counts, torch.full((200,), 1 / 200, dtype=torch.float64)) > 0.001
        assert abs(correlation(numbers[:-1], numbers[1:])) < 5 / math.sqrt(count)
        # Consecutive pairs fill the square evenly.
        square = np.histogram2d(numbers[:-1:2], numbers[1::2], bins=10, range=[(0, 1), (0, 1)])[0]
        assert chi_square_p(torch.from_numpy(square.ravel()), torch.full((100,), 0.01, dtype=torch.float64)) > 0.001
    one, other = (uniform([seed] * count, still, range(count)) for seed in (0, 1))
    assert abs(correlation(one, other)) < 5 / math.sqrt(count)
    assert abs(correlation(one[1:], other[:-1])) < 5 / math.sqrt(count)


def test_random_numbers_depend_on_seed_choice_and_position_only() -> None:
    """Fixed values: a change would break the seeds that callers have stored."""
    numbers = uniform([0, 1, -1, 2**63 - 1, 42], [0, 0, 0, 1, 1023], [0, 0, 0, 5, 10**6])
    assert [uniform([s], [c], [p])[0] for s, c, p in [(0, 0, 0), (1, 0, 0)]] == numbers[:2].tolist()
    assert numbers.tolist() == [
        0.3122295497459847, 0.6455473686277801, 0.3736932085852668, 0.16436448245596658, 0.47176242938865987
    ]  # fmt: skip
    assert len({*uniform([1, 2, 1, 2], [2, 1, 1, 2], [0, 0, 0, 0]).tolist(), *uniform([1, 1], [0, 2], [2, 2])}) == 6
