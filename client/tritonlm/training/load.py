"""Loads the data, tokenizer and model of a plan."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from .data import Data, abacus, fable, files
from .errors import TrainingError
from .lora import add_adapter
from .plan import TrainingPlan
from .tokenizer import character_tokenizer, train_bpe

BUILT_IN = ("abacus", "fable")


def load_data(plan: TrainingPlan) -> Data:
    if plan.data in BUILT_IN and plan.tokenizer == "keep":
        raise TrainingError(f"tokenizer: {plan.data} has its own tokenizer; use keep with other data and --model")
    if plan.data == "abacus":
        return abacus.load(plan.seed)
    if plan.data == "fable":
        return fable.load(plan.seed, plan.examples, plan.vocabulary)
    documents = files.read_documents(plan.data)
    texts = [document.text for document in documents if isinstance(document, files.Document)]
    if plan.model is None and len(texts) < len(documents):
        raise TrainingError("data: messages need a chat template; name a model that has one with model")
    tokenizer = make_tokenizer(plan, texts)
    encoding = files.Encoding(tokenizer, context_length(plan), end_token_ids(plan, tokenizer), plan.packing)
    return files.load(Path(plan.data).name, documents, encoding, plan.seed)


def make_tokenizer(plan: TrainingPlan, texts: list[str]) -> PreTrainedTokenizerFast:
    if plan.model is not None and plan.tokenizer in ("auto", "keep"):
        return _from_pretrained(AutoTokenizer, plan.model)
    if plan.tokenizer == "keep":
        raise TrainingError("tokenizer: keep uses the tokenizer of a model; name the model with --model")
    if plan.tokenizer == "character":
        characters = sorted({character for text in texts for character in text})
        return character_tokenizer("".join(characters))
    return train_bpe(texts, plan.vocabulary)


def make_model(plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast) -> Any:
    if plan.lora is not None:
        # The base is only read: on a CPU in float32, in which a resumed training ends with the same numbers.
        dtype = "auto" if torch.cuda.is_available() else torch.float32
        base = _from_pretrained(AutoModelForCausalLM, plan.model, use_safetensors=True, dtype=dtype)
        return add_adapter(base, plan.lora)
    if plan.model is not None:
        model = _from_pretrained(AutoModelForCausalLM, plan.model, use_safetensors=True)
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        return model
    end, sizes = tokenizer.eos_token_id, plan.sizes
    if sizes.width % sizes.heads:
        raise TrainingError(f"sizes: width {sizes.width} must be a multiple of heads {sizes.heads}")
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=sizes.context, n_embd=sizes.width, n_layer=sizes.layers,
            n_head=sizes.heads, bos_token_id=end, eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def context_length(plan: TrainingPlan) -> int:
    """The maximum number of tokens in a row."""
    if plan.model is None:
        return plan.sizes.context
    tokenizer: PreTrainedTokenizerFast = _from_pretrained(AutoTokenizer, plan.model)
    positions = getattr(_from_pretrained(AutoConfig, plan.model), "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), plan.sizes.context, positions or plan.sizes.context)


def end_token_ids(plan: TrainingPlan, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The tokens that end an answer: those at which a server stops, and the tokenizer's own."""
    ids: Any = None
    if plan.model is not None:
        with contextlib.suppress(OSError):  # it has no generation_config.json
            ids = GenerationConfig.from_pretrained(plan.model).eos_token_id
        ids = _from_pretrained(AutoConfig, plan.model).eos_token_id if ids is None else ids
    ends = ids if isinstance(ids, list) else [ids]
    return frozenset(end for end in [*ends, tokenizer.eos_token_id] if end is not None)


def _from_pretrained(auto_class: Any, name: str | None, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"model: {name} cannot be loaded: {reason}") from None
