"""Loads the data, tokenizer and model of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .data import Data, abacus, fable, files
from .errors import TrainingError
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
    tokenizer = make_tokenizer(plan, [document.text for document in documents])
    return files.load(Path(plan.data).name, documents, tokenizer, context_length(plan), plan.seed)


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
    return min(int(tokenizer.model_max_length), plan.sizes.context)


def _from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"model: {name} cannot be loaded: {reason}") from None
