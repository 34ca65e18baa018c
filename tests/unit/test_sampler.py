"""Sampling: penalties are those of transformers and OpenAI, and each row is independent of the batch.

test_logit_filters.py tests what the filters leave, and the random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine.sampling import logit_filters, sampler
from engine.sampling import logprobs as scoring
from engine.sampling.logit_filters import sample_tokens
from engine.sampling.logprobs import score
from engine.sampling.sampler import Sampled, SamplingState, sample, uniform
from fakes.sampling import VOCABULARY, some_logits, state
from transformers.generation import RepetitionPenaltyLogitsProcessor
from tritonlm.contract import SamplingParameters
from tritonlm.contract.chunk import TokenLogprob


def only(sampled: Sequence[Sampled | None]) -> Sampled:
    assert len(sampled) == 1
    assert sampled[0] is not None
    return sampled[0]


def score_prompt(logits: torch.Tensor, next_ids: list[int], alternatives: int) -> list[TokenLogprob | None]:
    scores = score(logits, range(len(next_ids)), next_ids, alternatives)
    return scores.entries(next_ids, [alternatives] * len(next_ids))


def test_sample_uses_the_seed_choice_and_position_of_the_state() -> None:
    logits = some_logits(1)
    for choice in (0, 3):
        one = state(seed=5, choice=choice)
        for position in range(20):
            expected = sample_tokens(logits, [one.settings], uniform([5], [choice], [position]))
            token = only(sample(logits, [one])).token_id
            assert token == int(expected)
            one.append(token)


def test_greedy_takes_the_lowest_id_among_ties() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[0, [7, 30]] = 1
    for rows in (logits, logits.bfloat16()):
        sampled = sample(rows, [state(temperature=0), state(temperature=0, top_p=0.1)])
        assert [row.token_id for row in sampled if row] == [7, 0]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = some_logits(8)
    states = [state(seed=row, temperature=1e-300) for row in range(8)]
    assert [row.token_id for row in sample(logits, states) if row] == logits.argmax(-1).tolist()


def test_repetition_penalty_equals_that_of_transformers() -> None:
    logits = some_logits(1)
    prompt, generated = [3, 3, 8, 60], [5, 8]
    reference = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + generated]), logits.clone())
    one = SamplingState(SamplingParameters(repetition_penalty=1.7), 0, VOCABULARY, prompt, generated)
    assert torch.equal(one.change(logits[0]), reference[0])


def test_frequency_and_presence_penalty_follow_openais_formula() -> None:
    logits = some_logits(1)[0]
    generated = [5, 8, 5, 5]
    parameters = SamplingParameters(frequency_penalty=0.4, presence_penalty=-0.3)
    expected = logits.clone()
    for token in set(generated):
        expected[token] -= generated.count(token) * 0.4 + 1 * -0.3
    changed = SamplingState(parameters, 0, VOCABULARY, [8, 9], generated).change(logits)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-6)
    untouched = [token for token in range(VOCABULARY) if token not in generated]
    assert torch.equal(changed[untouched], logits[untouched])


def test_bias_is_added_after_the_penalties() -> None:
    logits = some_logits(1)[0]
    expected = logits.clone()
    expected[4] = (expected[4] / 2 if expected[4] > 0 else expected[4] * 2) + 3.5
    expected[9] += -100
    parameters = SamplingParameters(logit_bias={4: 3.5, 9: -100.0}, repetition_penalty=2.0)
    assert torch.equal(SamplingState(parameters, 0, VOCABULARY, [4]).change(logits), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_banned_before_min_tokens(temperature: float) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [3, 17, 20]] = torch.tensor([50.0, 60.0, 20.0])
    parameters = SamplingParameters(temperature=temperature, min_tokens=2, max_tokens=9, stop_token_ids=(17,))
    one = SamplingState(parameters, 1, VOCABULARY, [3], end_ids=[3, 10**9])
    seen = []
    for _ in range(3):
        seen.append(only(sample(logits, [one])).token_id)
        one.append(seen[-1])
    assert seen == [20, 20, 17]


def mixed_states(count: int) -> list[SamplingState]:
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "logprobs": 4}, {"top_k": 7, "logprobs": 0},
        {"min_p": 0.1, "repetition_penalty": 1.3, "presence_penalty": 0.2},
        {"temperature": 0, "logprobs": 20, "frequency_penalty": 0.5},
        {"logit_bias": {3: 5.0}, "top_k": 20, "top_p": 0.7}, {"min_tokens": 3, "stop_token_ids": (4, 5)},
    ]  # fmt: skip
    return [state(seed=1000 + row, prompt=[row % 50, 7], **kinds[row % len(kinds)]) for row in range(count)]


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_bits_alone_and_in_a_batch_of_32(vocabulary: int, dtype: torch.dtype) -> None:
    states = [SamplingState(one.parameters, one.seed, vocabulary, [1, 2], end_ids=[0]) for one in mixed_states(32)]
    for step in range(6):
        logits = some_logits(32, seed=step, vocabulary=vocabulary).to(dtype)
        together = sample(logits, states)
        order = torch.randperm(32, generator=torch.Generator().manual_seed(step)).tolist()
        shuffled = sample(logits[order], [states[row] for row in order])
        for row, one in enumerate(states):
            alone = only(sample(logits[row : row + 1].clone(), [one]))
            assert alone == together[row] == shuffled[order.index(row)]
            one.append(alone.token_id)


def test_a_resumed_state_continues_like_the_first() -> None:
    first = mixed_states(16)
    generated: list[list[int]] = [[] for _ in first]
    for step in range(8):
        resumed = [
            SamplingState(one.parameters, one.seed, VOCABULARY, [row % 50, 7], generated[row])
            for row, one in enumerate(first)
        ]
        logits = some_logits(16, seed=step, spread=1.0)
        sampled = sample(logits, first)
        assert sample(logits, resumed) == sampled
        for row, result in enumerate(sampled):
            assert result is not None
            first[row].append(result.token_id)
            generated[row].append(result.token_id)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_of_invalid_logits_fails_alone(poison: float) -> None:
    states = mixed_states(16)
    logits = some_logits(16)
    expected = sample(logits, states)
    for row in range(16):
        bad = logits.clone()
        bad[row, 4] = poison
        assert sample(bad, states) == [None if r == row else expected[r] for r in range(16)]
        bad[row] = -math.inf
        assert sample(bad, states) == [None if r == row else expected[r] for r in range(16)]


def test_a_row_with_all_tokens_banned_fails_alone() -> None:
    everything = state(min_tokens=1, stop_token_ids=tuple(range(VOCABULARY)))
    other = state(seed=3)
    logits = some_logits(2)
    assert sample(logits, [everything, other]) == [None, *sample(logits[1:], [other])]


@pytest.mark.parametrize("count", range(21))
def test_logprobs_come_from_the_raw_logits(count: int) -> None:
    logits = some_logits(3, seed=count)
    states = [state(seed=row, logprobs=count, temperature=1.9, logit_bias={row: 9.0}) for row in range(3)]
    reference = logits.log_softmax(-1)
    for row, result in enumerate(sample(logits, states)):
        assert result is not None
        assert result.logprob is not None
        assert result.logprob.token_id == result.token_id
        assert result.logprob.logprob == pytest.approx(float(reference[row, result.token_id]), abs=1e-5)
        best = reference[row].topk(count)
        assert [token for token, _ in result.logprob.top] == best.indices.tolist()
        assert [value for _, value in result.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert dict(result.logprob.top).get(result.token_id, result.logprob.logprob) == result.logprob.logprob


def test_logprobs_come_only_on_request_and_order_ties_by_id() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 5] = -0.0
    scored, other = sample(logits, [state(temperature=0, logprobs=8), state(temperature=0)])
    assert scored is not None
    assert other is not None
    assert other.logprob is None
    assert scored.logprob is not None
    assert [token for token, _ in scored.logprob.top] == list(range(8))
    assert scored.logprob.top[0][1] == scored.logprob.logprob == pytest.approx(-math.log(VOCABULARY), abs=1e-6)


def test_alternatives_are_limited_by_the_vocabulary() -> None:
    result = only(sample(torch.zeros(1, 4), [state(vocabulary=4, prompt=(), temperature=0, logprobs=20)]))
    assert result.logprob is not None
    assert len(result.logprob.top) == 4


@pytest.mark.parametrize("alternatives", [0, 5])
def test_prompt_rows_are_scored_independently(alternatives: int) -> None:
    logits = some_logits(70).bfloat16()
    next_ids = [row % VOCABULARY for row in range(70)]
    scores = score_prompt(logits, next_ids, alternatives)
    reference = logits.float().log_softmax(-1)
    for row, entry in enumerate(scores):
        assert entry is not None
        assert entry.token_id == next_ids[row]
        assert entry.logprob == pytest.approx(float(reference[row, next_ids[row]]), abs=1e-5)
        assert len(entry.top) == alternatives
        assert score_prompt(logits[row : row + 1], [next_ids[row]], alternatives) == [entry]
        if alternatives and next_ids[row] == int(reference[row].argmax()):
            assert entry.logprob == max(value for _, value in entry.top)
    logits[3, 3] = math.nan
    assert score_prompt(logits, next_ids, alternatives)[2:5] == [scores[2], None, scores[4]]
    assert score_prompt(logits[:0], [], alternatives) == []


@pytest.mark.parametrize("rows", [None, [1, 2, 5, 9, 11], [0, 7]])
def test_the_size_of_row_groups_does_not_change_results(
    monkeypatch: pytest.MonkeyPatch, rows: list[int] | None
) -> None:
    logits = some_logits(12, seed=4)
    logits[2, 5] = math.nan
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 0, "logit_bias": {9: 50.0}}, {"top_p": 0.7, "frequency_penalty": 1.5},
        {"temperature": 1.4, "logprobs": 3}, {"top_k": 4, "repetition_penalty": 1.7, "logprobs": 2},
    ]  # fmt: skip
    numbers = list(range(12)) if rows is None else rows

    def results() -> list[Sampled | None]:
        return sample(logits, [state(seed=n, **kinds[n % 5]) for n in numbers], rows=rows)

    expected = results()
    alone = [only(sample(logits[n : n + 1], [state(seed=n, **kinds[n % 5])])) for n in numbers if n != 2]
    assert [one for n, one in zip(numbers, expected, strict=True) if n != 2] == alone
    assert [one is None for one in expected] == [n == 2 for n in numbers]
    monkeypatch.setattr(scoring, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(scoring, "_LEAST_WIDTH", 7)
    for module in (logit_filters, sampler):
        monkeypatch.setattr(module, "rows_at_once", lambda *_: 2)
    assert results() == expected


def test_sampling_does_not_change_the_logits_and_their_argmax() -> None:
    logits = some_logits(6)
    kept, best = logits.clone(), sampler.Argmax.of(logits)
    sample(logits, [state(seed=n, logit_bias={3: 9.0} if n % 2 else {}) for n in range(6)], best)
    assert torch.equal(logits, kept)
    assert torch.equal(best.ids, kept.argmax(dim=-1))
