"""One property of structured outputs: a text is a function of request and seed, whatever happens to its computation.

It is compared with the text that the request gets alone in an engine without draft tokens and with memory to spare.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine.engine import Engine
from evaluations.realistic_schemas import generate
from fakes.tiny_lm import make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .harness import Collected, make_text_engine, run, submit
from .structured_outputs import CONSTRAINTS, PROMPT

SCHEMAS = [{"json": schema} for schema, refused in generate(24, seed=11) if not refused]
FORMS = [*CONSTRAINTS.values(), *SCHEMAS]
FREE = {"max_tokens": 24, "ignore_eos": True}
Text = tuple[list[int], str, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("equality") / "lm")


@pytest.fixture(scope="module")
def calm(folder: Path) -> Engine:
    return make_text_engine(folder)[0]


@pytest.fixture(scope="module")
def hostile(folder: Path) -> Engine:
    """Little memory, prompts in small pieces, and draft tokens in every step."""
    engine, _ = make_text_engine(folder, kv_cache_tokens=100, max_context_tokens=80, prefill_tokens=8,
                                 speculative_tokens=6)  # fmt: skip
    engine._speculation_gate = None
    return engine


def text(output: Collected) -> Text:
    return output.token_ids, output.final.finish_reason, output.final.usage.completion


@pytest.mark.parametrize("form", CONSTRAINTS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_is_resumed_at_every_position(calm: Engine, form: str, temperature: float) -> None:
    """All resumed texts run together, so each is in a batch with others at other positions."""
    params: dict[str, Any] = {"structured_outputs": CONSTRAINTS[form], "max_tokens": 40, "temperature": temperature}
    whole = submit(calm, PROMPT, **params)
    run(calm)
    ids, reason, count = text(whole)
    resumed = [submit(calm, PROMPT, resume_token_ids=ids[:cut], **params) for cut in range(len(ids))]
    run(calm)
    assert [text(output) for output in resumed] == [(ids[cut:], reason, count) for cut in range(len(ids))]


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(
        st.tuples(st.sampled_from(FORMS), st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 2**32 - 1)),
        min_size=1, max_size=4,
    ),
    cut=st.floats(0, 1), streamed=st.booleans(), free=st.integers(0, 3),
)  # fmt: skip
def test_a_text_is_the_same_whatever_happens(
    calm: Engine, hostile: Engine, requests: list[tuple[Any, float, int]], cut: float, streamed: bool, free: int
) -> None:
    def parameters(number: int) -> dict[str, Any]:
        form, temperature, seed = requests[number]
        return {"structured_outputs": form, "temperature": temperature, "seed": seed, "max_tokens": 36}

    alone: list[Text] = []
    for number in range(len(requests)):
        output = submit(calm, PROMPT, **parameters(number))
        run(calm)
        alone.append(text(output))
    beside = [submit(hostile, PROMPT, seed=seed, temperature=1.0, **FREE) for seed in range(free)]
    whole = [submit(hostile, PROMPT, stream=streamed, **parameters(number)) for number in range(len(requests))]
    # As after a kill: another process gets the tokens so far.
    kept = [int(cut * max(len(ids) - 1, 0)) for ids, _, _ in alone]
    resumed = [
        submit(
            hostile, PROMPT, stream=streamed, resume_token_ids=alone[number][0][: kept[number]], **parameters(number)
        )
        for number in range(len(requests))
    ]
    run(hostile)
    assert [text(output) for output in whole] == alone
    assert [text(output) for output in resumed] == [
        (ids[count:], reason, total) for (ids, reason, total), count in zip(alone, kept, strict=True)
    ]
    assert all(output.final.usage.completion == FREE["max_tokens"] for output in beside)


def test_the_disturbances_happened(hostile: Engine) -> None:
    """The test before has preempted sequences, and had draft tokens accepted."""
    assert hostile.scheduler.preemptions > 5
    assert hostile.metric_values()["speculative_accepted_tokens"] > 30
    assert hostile.metric_values()["forced_tokens"] > 100
