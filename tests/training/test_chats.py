"""Chats as training data: labels on answers only, prompts as a server computes them, and packed rows kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import chat_templates
from fakes.checkpoints import TEXT
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from tritonlm.training.data import chats, files
from tritonlm.training.errors import TrainingError
from tritonlm.training.examples import IGNORED, Example, Examples
from tritonlm.training.packing import check_packing
from tritonlm.training.tokenizer import train_bpe

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = """{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}\
{{ message.content }}{% endgeneration %}<|im_end|>{% else %}{{ message.content }}{% endif %}{% endfor %}"""
QUESTION, ANSWER = {"role": "user", "content": "who was the fox"}, {"role": "assistant", "content": "the quick one"}
FURTHER = [{"role": "user", "content": "and the house"}, {"role": "assistant", "content": "old"}]


def tokenizer_with(template: str | dict[str, str] | None) -> PreTrainedTokenizerFast:
    tokenizer = train_bpe([TEXT], 320, ("<|im_start|>", "<|im_end|>"))
    tokenizer.chat_template = template
    return tokenizer


def encoder(template: str | dict[str, str] | None, context: int = 512) -> chats.ChatEncoder:
    tokenizer = tokenizer_with(template)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    return chats.ChatEncoder(tokenizer, ends, context)


def chat(*messages: dict[str, Any], **row: Any) -> chats.Chat:
    return chats.read_chat({"messages": list(messages), **row}, "a.jsonl, line 3")


def learnt(example: Example) -> str:
    return tokenizer_with(None).decode([label for label in example.labels if label != IGNORED])


class TestLabels:
    def test_answers_and_their_ends_are_learnt_and_nothing_else(self) -> None:
        (example,) = encoder(CHATML).examples(chat({"role": "system", "content": "hello"}, QUESTION, ANSWER, *FURTHER))
        assert learnt(example) == "the quick one<|im_end|>old<|im_end|>"
        assert tokenizer_with(None).decode(example.ids).endswith("<|im_start|>assistant\nold<|im_end|>")

    def test_an_answers_prompt_is_what_a_server_encodes(self) -> None:
        tokenizer = tokenizer_with(CHATML)
        (example,) = encoder(CHATML).examples(chat(QUESTION, ANSWER, *FURTHER))
        for messages in ([QUESTION], [QUESTION, ANSWER, FURTHER[0]]):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer.encode(text, add_special_tokens=False)
            assert example.ids[: len(prompt)] == prompt
            assert example.labels[len(prompt) - 1] == IGNORED
            assert example.labels[len(prompt)] != IGNORED

    def test_a_template_that_changes_earlier_answers_makes_an_example_of_each(self) -> None:
        thoughts = "<think>{{ message.reasoning_content }}</think>"
        later = f"{{% if loop.last and message.role == 'assistant' %}}{thoughts}{{% endif %}}"
        template = CHATML.replace("+ message.content +", f"}}}}{later}{{{{ message.content +")
        thinking = {**ANSWER, "reasoning_content": "fox"}
        first, second = encoder(template).examples(chat(QUESTION, thinking, FURTHER[0], {**FURTHER[1], **thinking}))
        assert learnt(first) == learnt(second) == "<think>fox</think>the quick one<|im_end|>"
        assert tokenizer_with(None).decode(second.ids).count("<think>") == 1

    def test_an_answer_without_an_end_gets_the_tokenizers(self) -> None:
        (example,) = encoder(chat_templates.PLAIN).examples(chat(QUESTION, ANSWER))
        assert learnt(example) == f"the quick one{tokenizer_with(None).eos_token}"
        # A server's prompt of the next answer has no end there, so that the next answer is an example of its own.
        assert len(encoder(chat_templates.PLAIN).examples(chat(QUESTION, ANSWER, *FURTHER))) == 2

    def test_marks_of_the_template_decide_and_include_the_end(self) -> None:
        (example,) = encoder(MARKED).examples(chat(QUESTION, ANSWER, *FURTHER))
        assert learnt(example) == "the quick one<|im_end|>old<|im_end|>"

    def test_tools_are_written_by_templates_that_know_them(self) -> None:
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
        (example,) = encoder(chat_templates.QWEN).examples(chat(QUESTION, ANSWER, tools=[tool]))
        assert '"name": "look"' in tokenizer_with(None).decode(example.ids)
        several = {"default": CHATML, "tool_use": chat_templates.QWEN}
        assert encoder(several).examples(chat(QUESTION, ANSWER, tools=[tool])) == [example]
        assert encoder(several).examples(chat(QUESTION, ANSWER)) == encoder(CHATML).examples(chat(QUESTION, ANSWER))
        with pytest.raises(TrainingError, match="line 3: the model's chat template writes no tools; leave them out"):
            encoder(CHATML).examples(chat(QUESTION, ANSWER, tools=[tool]))


class TestRefusals:
    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "messages must be a list"),
            (["hello"], "messages must be a list"),
            ([{"content": "hello"}], "messages must be a list"),
            ([QUESTION, ANSWER, QUESTION], "the last message must be one of the role assistant"),
        ],
    )
    def test_a_row_that_is_no_chat(self, messages: Any, message: str, tmp_path: Path) -> None:
        file = tmp_path / "chats.jsonl"
        file.write_text(json.dumps({"messages": [QUESTION, ANSWER]}) + "\n" + json.dumps({"messages": messages}) + "\n")
        with pytest.raises(TrainingError, match=f"line 2: {message}"):
            files.read_documents(str(file))

    def test_a_template_whose_answers_do_not_follow_its_generation_prompt(self) -> None:
        with pytest.raises(TrainingError, match=r"line 3: the chat template does not write .* with {% generation %}"):
            encoder(chat_templates.REASONING).examples(chat(QUESTION, ANSWER))

    def test_a_template_that_refuses_a_chat(self) -> None:
        with pytest.raises(TrainingError, match="line 3: the chat template refuses this chat: roles must alternate"):
            encoder(chat_templates.PLAIN).examples(chat(QUESTION, QUESTION, ANSWER))

    def test_a_chat_longer_than_a_row(self) -> None:
        with pytest.raises(TrainingError, match=r"line 3 has \d+ tokens, and a row 8; .* set a larger context"):
            encoder(CHATML, 8).examples(chat(QUESTION, ANSWER))

    def test_a_model_without_a_template(self) -> None:
        with pytest.raises(TrainingError, match="messages need a chat template"):
            encoder(None)


EXAMPLES = [Example.after(2, list(range(10, 10 + length))) for length in (9, 4, 7, 3, 5, 12)]


class TestPacking:
    def test_rows_are_filled_and_every_example_is_whole(self) -> None:
        packed = Examples.packed(EXAMPLES, 16)
        assert packed.positions is not None
        assert len(packed) == 3
        found = []
        for ids, labels, positions in zip(packed.ids, packed.labels, packed.positions, strict=True):
            starts = [index for index in range(16) if positions[index] == 0 and ids[index]]
            for start, end in zip(starts, [*starts[1:], 16], strict=True):
                count = sum(ids[start:end] > 0)
                assert list(positions[start : start + count]) == list(range(count))
                found.append((list(ids[start : start + count]), list(labels[start : start + count])))
        assert sorted(found) == sorted((list(example.ids), list(example.labels)) for example in EXAMPLES)

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_the_loss_of_packed_rows_is_that_of_single_ones(self, family: str) -> None:
        model = tiny(family)
        check_packing(model, Examples.packed(EXAMPLES, 16))
        assert abs(loss_of(model, Examples.packed(EXAMPLES, 16)) - loss_of(model, Examples.padded(EXAMPLES))) < 1e-5

    def test_a_model_that_cannot_keep_examples_apart_is_refused(self) -> None:
        with pytest.raises(TrainingError, match=r"packing: .*bloom.* leave packing out"):
            check_packing(tiny("bloom"), Examples.packed(EXAMPLES, 16))


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    if family == "bloom":
        return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5,
        )
    ).eval()  # fmt: skip


@torch.inference_mode()
def loss_of(model: Any, examples: Examples) -> float:
    return float(model(**examples.__getitems__(range(len(examples))), use_cache=False).loss)
