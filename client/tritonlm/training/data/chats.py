"""Chats as training examples: the checkpoint's chat template writes them, and only answers have labels.

An answer is trained behind exactly the tokens that a server computes for the messages before it. It knows templates and
tokenizers; where chats come from is `files`' concern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from tritonlm.contract.tool_formats import tool_template

from ..errors import TrainingError
from ..examples import IGNORED, Example

ANSWERING = "assistant"
# A template may mark what the model writes: {% generation %}…{% endgeneration %}.
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Chat:
    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None
    # File and line, for messages.
    location: str


def read_chat(row: dict[str, Any], location: str) -> Chat:
    """The chat of a JSONL row, or TrainingError."""
    messages, tools = row["messages"], row.get("tools")
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise TrainingError(f'data: {location}: messages must be a list of {{"role": …, "content": …}}')
    if messages[-1]["role"] != ANSWERING:
        raise TrainingError(f"data: {location}: the last message must be one of the role {ANSWERING}: it is learnt")
    if tools is not None and not isinstance(tools, list):
        raise TrainingError(f"data: {location}: tools must be a list")
    return Chat(messages, tools or None, location)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


class ChatEncoder:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_ids: Iterable[int], context: int) -> None:
        """`end_ids` are the tokens that end an answer; `context` is the most tokens of an example."""
        self._tokenizer, self._end_ids, self._context = tokenizer, frozenset(end_ids), context
        template = tokenizer.chat_template
        named = template if isinstance(template, dict) else {"default": template}
        default = named.get("default")
        if default is None:
            raise TrainingError("data: messages need a chat template; name a model that has one")
        # As a server uses them.
        self._template: str = default
        self._tool_template: str = tool_template(default, named.get("tool_use")) or default

    def examples(self, chat: Chat) -> list[Example]:
        """One example where each answer's prompt continues the text before; else one for each answer."""
        template = self._template_of(chat)
        if chat.tools and not re.search(r"\btools\b", template):
            raise TrainingError(f"data: {chat.location}: the model's chat template writes no tools; leave them out")
        examples = [self._by_marks(chat)] if _MARKED.search(template) else self._by_prefixes(chat)
        for example in examples:
            if len(example.ids) > self._context:
                raise TrainingError(
                    f"data: {chat.location} has {len(example.ids):,} tokens, and a row {self._context:,}; shorten it, "
                    "or set a larger context"
                )
        return examples

    def _template_of(self, chat: Chat) -> str:
        return self._tool_template if chat.tools else self._template

    def prompt(self, chat: Chat) -> str:
        """The text before the last answer."""
        return self._render(chat, len(chat.messages) - 1, for_answer=True)

    def _by_prefixes(self, chat: Chat) -> list[Example]:
        examples: list[Example] = []
        for index in range(len(chat.messages)):
            if chat.messages[index]["role"] == ANSWERING:
                example = self._answer(chat, index)
                if examples and (joined := _continued(examples[-1], example)):
                    examples[-1] = joined
                else:
                    examples.append(example)
        return examples

    def _answer(self, chat: Chat, index: int) -> Example:
        """The answer at `index` behind its prompt, up to the token that ends it."""
        prompt, text = self._render(chat, index, for_answer=True), self._render(chat, index + 1)
        prompt_ids, ids = self._encode(prompt), self._encode(text)
        if not text.startswith(prompt) or ids[: len(prompt_ids)] != prompt_ids:
            raise TrainingError(
                f"data: {chat.location}: the chat template does not write an answer behind its own generation prompt, "
                f"so the answer's tokens cannot be distinguished; mark answers in the template with {{% generation %}}"
            )
        ends = [position for position in range(len(prompt_ids), len(ids)) if ids[position] in self._end_ids]
        # Without its own end, an answer ends as a text does; what follows an end is the next message's beginning.
        ids = ids[: ends[-1] + 1] if ends else [*ids, self._tokenizer.eos_token_id]
        return Example.after(len(prompt_ids), ids)

    def _by_marks(self, chat: Chat) -> Example:
        marked = self._apply(chat, chat.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(marked["input_ids"]), list(marked["assistant_masks"])
        # Marks often leave out the end, without which an answer would never stop.
        learnt = [
            is_marked or (position > 0 and mask[position - 1] and ids[position] in self._end_ids)
            for position, is_marked in enumerate(mask)
        ]
        if not any(learnt):
            raise TrainingError(f"data: {chat.location}: the chat template marks no text of this chat as an answer")
        last = max(position for position, is_learnt in enumerate(learnt) if is_learnt) + 1
        return Example(ids[:last], [ids[position] if learnt[position] else IGNORED for position in range(last)])

    def _render(self, chat: Chat, count: int, for_answer: bool = False) -> str:
        text: str = self._apply(chat, chat.messages[:count], tokenize=False, add_generation_prompt=for_answer)
        return text

    def _apply(self, chat: Chat, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=chat.tools, chat_template=self._template_of(chat), **options
            )
        except Exception as error:  # a template is a program and may raise anything
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(f"data: {chat.location}: the chat template refuses this chat: {reason}") from None

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def _continued(earlier: Example, later: Example) -> Example | None:
    """Both answers in one example, if the later one's prompt begins with all of the earlier one."""
    length = len(earlier.ids)
    prompt_length = next(position for position, label in enumerate(later.labels) if label != IGNORED)
    if length > prompt_length or list(later.ids[:length]) != list(earlier.ids):
        return None
    return Example(later.ids, [*earlier.labels, *later.labels[length:]])
