"""Adapters in the engine: PEFT's own outputs, whatever else is in a step, and prefixes that are kept apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.engine import Engine
from engine.request import Request
from engine.runners.native.runner import NativeRunner
from fakes.tiny_lm import make_checkpoint
from tritonlm.contract import (
    CheckpointError,
    GenerationRequest,
    InvalidRequest,
    NotOffered,
    QueueTimeout,
    SamplingParameters,
)
from tritonlm.contract.embedding import Embedding
from tritonlm.contract.errors import AdapterNotFound

from .adapters import PeftReference, add, write_adapter
from .family_zoo import VOCABULARY, ZOO
from .harness import Collected, make_engine, make_text_engine, run, step, submit

PROMPT = [5, 17, 300, 2, 444, 61, 8]
LONG = [(31 * i) % 480 + 5 for i in range(50)]
RUNNERS = ("reference", "native")
NAMES = ("", "one", "two")
# Families of the zoo, with the settings of their adapters: every rank and scaling, fused and split layers, every kind
# of target_modules.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "llama": {"r": 16},
    "llama biases": {"use_rslora": True, "r": 8, "target_modules": ["v_proj", "up_proj"]},
    "qwen3": {"rank_pattern": {"q_proj": 1, r"^model\.layers\.1\.mlp\.down_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    "gemma3_text": {"r": 1, "target_modules": r".*\.(q|v|down)_proj"},
    "phi": {"r": 256, "lora_alpha": 16},
    "phi3": {"r": 64, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
    "gpt_neox": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def made(folders: Path, family: str) -> tuple[Path, Path]:
    """A base of this family, and the file of its adapters `one` and `two`."""
    folder = folders / family.replace(" ", "-")
    base, file = folder / "base", folder / "adapters.json"
    if not file.exists():
        context = "n_positions" if family == "gpt2" else "max_position_embeddings"
        sizes = {"initializer_range": 0.2, "vocab_size": VOCABULARY, context: 256, **ZOO[family]}
        make_checkpoint(base, seed=3, model_type=family.split(maxsplit=1)[0], **sizes)
        for seed, name in enumerate(NAMES[1:]):
            add(file, **{name: write_adapter(base, folder / name, seed, **CASES[family])})
    return base, file


def engine_of(made: tuple[Path, Path], runner: str, **settings: Any) -> Engine:
    base, file = made
    return make_engine(base, **{"adapters_file": str(file), "dtype": "float32", "runner": runner, **settings})


@pytest.fixture(scope="module", params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llama(folders: Path) -> tuple[Path, Path]:
    return made(folders, "llama")


@pytest.fixture(scope="module")
def engine(llama: tuple[Path, Path], runner: str) -> Engine:
    return engine_of(llama, runner, enable_embeddings=True)


def result(collected: Collected, engine: Engine) -> list[Any]:
    """Tokens and log-probabilities: exact for the native kernels, of which each row is computed for itself."""
    exact = isinstance(engine.runner, NativeRunner)
    return [
        (e.token_id, e.logprob if exact or e.logprob is None else pytest.approx(e.logprob, abs=1e-4))
        for e in collected.logprobs
    ]


def alone(engine: Engine, prompt: list[int] = PROMPT, **parameters: Any) -> Collected:
    collected = submit(engine, prompt, **parameters)
    run(engine)
    return collected


@pytest.mark.parametrize("family", sorted(CASES))
def test_texts_and_log_probabilities_are_those_of_peft(folders: Path, runner: str, family: str) -> None:
    base, file = made(folders, family)
    engine = engine_of((base, file), runner)
    outputs = {name: submit(engine, PROMPT, adapter=name, logprobs=2, echo=True) for name in NAMES}
    run(engine)
    for name, output in outputs.items():
        reference = PeftReference(base, file.parent / name if name else None)
        ids = [*PROMPT, *output.token_ids]
        expected = reference.logprobs(ids)
        assert output.token_ids == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist()
        assert [entry.token_id for entry in output.logprobs] == ids
        for position, entry in enumerate(output.logprobs[1:]):
            assert entry.logprob == pytest.approx(float(expected[position, ids[position + 1]]), abs=1e-4)
    scores = [torch.tensor([e.logprob for e in output.logprobs[1 : len(PROMPT)]]) for output in outputs.values()]
    for one, other in itertools.combinations(scores, 2):
        assert (one - other).abs().max() > 0.05, "the adapters change nothing"


def test_a_text_is_the_same_alone_and_among_others(engine: Engine) -> None:
    sent: list[tuple[list[int], dict[str, Any]]] = [
        ((PROMPT, LONG, [7] * 33)[number % 3],
         {"adapter": NAMES[number % 4 % 3], "temperature": number % 2, "logprobs": 0, "choice": number})
        for number in range(16)
    ]  # fmt: skip
    expected = [result(alone(engine, prompt, **parameters), engine) for prompt, parameters in sent]
    outputs = []
    for prompt, parameters in sent:
        outputs.append(submit(engine, prompt, **parameters))
        step(engine)
    run(engine)
    assert [[(e.token_id, e.logprob) for e in output.logprobs] for output in outputs] == expected


@pytest.mark.parametrize(
    "settings",
    [{"prefill_tokens": 7}, {"kv_cache_tokens": 100, "max_context_tokens": 90}, {"speculative_tokens": 6}],
)
def test_chunks_preemption_and_draft_tokens_change_no_text(
    llama: tuple[Path, Path], engine: Engine, runner: str, settings: dict[str, Any]
) -> None:
    sent: list[dict[str, Any]] = [
        {"adapter": name, "logprobs": 0, "max_tokens": 30, "choice": choice} for choice in (0, 1) for name in NAMES
    ]
    prompt = [*LONG[:9], *LONG[:9], *LONG[:9]]
    expected = [result(alone(engine, prompt, **parameters), engine) for parameters in sent]
    other = engine_of(llama, runner, **settings)
    outputs = [submit(other, prompt, **parameters) for parameters in sent]
    run(other)
    assert [[(e.token_id, e.logprob) for e in output.logprobs] for output in outputs] == expected
    assert other.scheduler.preemptions > 0 or "kv_cache_tokens" not in settings


def test_a_resumed_text_continues_with_its_adapter(engine: Engine) -> None:
    whole = alone(engine, LONG, adapter="one", temperature=1.0).token_ids
    rest = alone(engine, LONG, adapter="one", temperature=1.0, resume_token_ids=whole[:5])
    assert rest.token_ids == whole[5:]


@pytest.mark.parametrize(
    "others", [({}, {"adapter": "two"}, {"cache_salt": "a"}), ({"cache_salt": "a"}, {"cache_salt": "b"}, {})]
)
def test_a_prefix_is_shared_with_the_same_adapter_and_salt_only(
    llama: tuple[Path, Path], runner: str, others: tuple[dict[str, str], ...]
) -> None:
    engine = engine_of(llama, runner)
    cached = (len(LONG) - 1) // 4 * 4
    for parameters in ({"adapter": "one"}, {"adapter": "one", "cache_salt": "a"}, *others):
        assert alone(engine, LONG, **parameters).final.usage.cached == 0, parameters
    for parameters in ({"adapter": "one"}, {"adapter": "one", "cache_salt": "a"}, *others):
        assert alone(engine, LONG, **parameters).final.usage.cached == cached, parameters


def test_requests_that_start_together_share_a_prefix_of_their_own(engine: Engine) -> None:
    prompt = [9, *LONG[:40]]
    outputs = {name: [submit(engine, prompt, adapter=name, choice=n) for n in (0, 1)] for name in NAMES}
    run(engine)
    for pair in outputs.values():
        assert [output.final.usage.cached for output in pair] == [0, 40]
    assert len({tuple(pair[1].token_ids) for pair in outputs.values()}) == 3


def test_an_embedding_is_that_of_the_adapter(llama: tuple[Path, Path], engine: Engine) -> None:
    received = {name: Collected() for name in NAMES}
    for name in NAMES:
        params = SamplingParameters.from_mapping({"max_tokens": 1, "seed": 0, "adapter": name})
        engine.submit(Request("", PROMPT, GenerationRequest(params, embed=True), received[name].deliver))
    run(engine)
    base, file = llama
    for name, collected in received.items():
        (item,) = collected.items
        assert isinstance(item, Embedding)
        states = PeftReference(base, file.parent / name if name else None).hidden(PROMPT).mean(0)
        assert item.vector == pytest.approx(torch.nn.functional.normalize(states, dim=0).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("target_modules", "named"), [(["lm_head"], "lm_head"), (["q_proj"], "model.layers.0.self_attn.q_proj")]
)
def test_an_adapter_of_another_base_is_refused_by_the_names_of_its_layers(
    llama: tuple[Path, Path], runner: str, tmp_path: Path, target_modules: list[str], named: str
) -> None:
    base, _ = llama
    if target_modules == ["q_proj"]:
        base = make_checkpoint(tmp_path / "other", model_type="llama", **(ZOO["llama"] | {"hidden_size": 32}))
    folder = write_adapter(base, tmp_path / "adapter", target_modules=target_modules)
    add(tmp_path / "adapters.json", foreign=folder)
    engine = engine_of((llama[0], tmp_path / "adapters.json"), runner)
    refused, accepted = submit(engine, PROMPT, adapter="foreign"), submit(engine, PROMPT)
    run(engine)
    assert isinstance(refused.error, CheckpointError)
    assert "'foreign'" in refused.error.message
    assert named in refused.error.message
    assert accepted.final.finish_reason == "length"


def test_an_unknown_adapter_is_refused_by_name(engine: Engine) -> None:
    refused = alone(engine, PROMPT, adapter="three").error
    assert isinstance(refused, AdapterNotFound)
    assert refused.message == "adapters has no adapter 'three'; it has one, two"
    assert (refused.param, refused.http_status) == ("adapter", 404)


def test_without_an_adapters_file_adapters_are_not_offered(llama: tuple[Path, Path], runner: str) -> None:
    engine = engine_of(llama, runner, adapters_file="")
    with pytest.raises(NotOffered, match="adapters_file"):
        submit(engine, PROMPT, adapter="one")
    # A salt needs no adapters.
    assert alone(engine, LONG, cache_salt="a").final.usage.cached == 0
    assert alone(engine, LONG, cache_salt="a").final.usage.cached > 0
    assert alone(engine, LONG).final.usage.cached == 0


def test_a_replaced_adapter_leaves_running_requests_as_they_are(
    llama: tuple[Path, Path], runner: str, tmp_path: Path
) -> None:
    base, file = llama
    own = tmp_path / "adapters.json"
    add(own, changing=file.parent / "one")
    engine = engine_of((base, own), runner)
    expected = {name: alone(engine_of(llama, runner), LONG, adapter=name).token_ids for name in NAMES[1:]}
    before = submit(engine, LONG, adapter="changing")
    for _ in range(3):
        step(engine)
    add(own, changing=file.parent / "two")
    after = submit(engine, LONG, adapter="changing")
    run(engine)
    assert (before.token_ids, after.token_ids) == (expected["one"], expected["two"])
    assert after.final.usage.cached == 0, "the new weights would read the old one's keys"
    assert engine.metric_values()["adapters"] == 1
    assert engine.metric_values()["adapter_loads"] == 2


def test_requests_that_wait_for_an_adapter_are_cancelled_and_end_in_time(
    llama: tuple[Path, Path], runner: str, wait_for: Callable[[Callable[[], bool]], None]
) -> None:
    engine = engine_of(llama, runner, max_adapters=1)
    running = submit(engine, PROMPT, adapter="one", max_tokens=20)
    step(engine)
    cancelled, late = submit(engine, PROMPT, adapter="two", request_id="cancelled"), Collected()
    # It would end without a step.
    echoed = submit(engine, PROMPT, adapter="two", request_id="cancelled", echo=True, max_tokens=0)
    params = SamplingParameters.from_mapping({"max_tokens": 1, "seed": 0, "adapter": "two"})
    engine.submit(Request("", PROMPT, GenerationRequest(params), late.deliver, queue_deadline=0.0))
    patient = submit(engine, PROMPT, adapter="two")
    assert engine.cancel("cancelled") == 2
    engine.try_step()
    engine.deliver_now()
    assert cancelled.final.finish_reason == echoed.final.finish_reason == "cancelled"
    assert isinstance(late.error, QueueTimeout)
    assert running.ends[-1:] != [True]
    while engine.try_step():
        engine.deliver_now()
    assert running.final.usage.completion == 20
    run(engine)
    assert patient.token_ids == alone(engine, PROMPT, adapter="two").token_ids
    assert engine.metric_values()["adapters"] == 1
    wait_for(lambda: all(adapter["running"] == 0 for adapter in engine.reports.status()["adapters"]))


def test_an_adapter_and_a_grammar_hold_together(llama: tuple[Path, Path], runner: str) -> None:
    base, file = llama
    engine, tokenizer = make_text_engine(base, adapters_file=str(file), dtype="float32", runner=runner)
    outputs = {name: submit(engine, PROMPT, adapter=name, structured_outputs={"regex": "[a-z]{8,12}"}, max_tokens=30)
               for name in NAMES}  # fmt: skip
    run(engine)
    texts = {name: tokenizer.decode(output.token_ids) for name, output in outputs.items()}
    assert all(re.fullmatch("[a-z]{8,12}", text) for text in texts.values()), texts
    assert len(set(texts.values())) == 3
    refused = alone(engine, PROMPT, adapter="one", structured_outputs={"regex": "("}).error
    assert isinstance(refused, InvalidRequest)
    assert {adapter["running"] for adapter in engine.reports.status()["adapters"]} == {0}


def test_a_graph_runner_computes_steps_with_adapters_without_its_recordings(llama: tuple[Path, Path]) -> None:
    expected, tested = engine_of(llama, "reference"), engine_of(llama, "graphs")
    outputs = []
    for engine in (expected, tested):
        received = [submit(engine, PROMPT, adapter=name, max_tokens=4 * n + 4) for n, name in enumerate(NAMES[::-1])]
        run(engine)
        outputs.append([collected.token_ids for collected in received])
    assert outputs[0] == outputs[1]
    assert tested.runner.graphs.recordings, "the base's last steps are recorded"  # type: ignore[attr-defined]
