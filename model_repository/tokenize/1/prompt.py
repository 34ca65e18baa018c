"""Reads and validates a caller's inputs: the prompt's token ids, and the canonical request for the engine.

It knows the checkpoint's tokenizer and the allowed inputs. It does not know Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from tritonlm.checkpoints.tokenizer import load_tokenizer
from tritonlm.contract import Checkpoint, GenerationRequest, InvalidRequest, SamplingParameters
from tritonlm.contract.tensors import EXCLUDE_INPUT, INPUT_IDS, MESSAGES, SAMPLING_PARAMETERS, STREAM, TEXT_INPUT, Array
from tritonlm.contract.tool_formats import tool_template
from tritonlm.contract.triton_requests import text_of

from .chat import ChatTemplate
from .limits import Limits
from .messages import read_chat

_PROMPTS = (TEXT_INPUT.name, INPUT_IDS.name, MESSAGES.name)


class RequestReader:
    def __init__(self, checkpoint: Checkpoint, limits: Limits, tool_format: str | None = None) -> None:
        self._encoder = PromptEncoder(checkpoint, tool_format)
        self._limits = limits

    def read(self, inputs: Mapping[str, Array], flat: Mapping[str, Any]) -> tuple[list[int], GenerationRequest]:
        """The prompt's ids and the validated request; `flat` are Triton's request parameters."""
        parameters, prompt_ids = self._read_prompt(inputs, flat)
        if parameters.truncate_prompt_tokens is not None:
            prompt_ids = prompt_ids[-parameters.truncate_prompt_tokens :]
        parameters = self._limits.complete(parameters, len(prompt_ids), is_chat=MESSAGES.name in inputs)
        stream = _flag(inputs, STREAM.name, default=False)
        exclude_prompt = _flag(inputs, EXCLUDE_INPUT.name, default=stream)
        return prompt_ids, GenerationRequest(parameters, stream, parameters.echo or not exclude_prompt)

    def read_ids(self, inputs: Mapping[str, Array], flat: Mapping[str, Any]) -> list[int]:
        """The prompt's ids alone, without a limit on their number, because nothing is generated."""
        return self._read_prompt(inputs, flat)[1]

    def render(self, inputs: Mapping[str, Array]) -> str:
        """A chat as text; nothing is generated."""
        messages = text_of(MESSAGES, inputs)
        if messages is None:
            raise InvalidRequest("rendered_prompt needs messages", MESSAGES.name)
        return self._encoder.render(messages)

    def _read_prompt(
        self, inputs: Mapping[str, Array], flat: Mapping[str, Any]
    ) -> tuple[SamplingParameters, list[int]]:
        parameters = SamplingParameters.from_json(text_of(SAMPLING_PARAMETERS, inputs) or "", flat)
        prompt_ids, param = self._encoder.encode(inputs, parameters.add_special_tokens)
        self._limits.check_vocabulary(prompt_ids, param)
        return parameters, prompt_ids


class PromptEncoder:
    """Converts each kind of prompt to token ids."""

    def __init__(self, checkpoint: Checkpoint, tool_format: str | None = None) -> None:
        self._tokenizer = _load_tokenizer(checkpoint)
        tool_format, template = tool_format or checkpoint.tool_format, checkpoint.chat_template
        self._chat_template = ChatTemplate(template, checkpoint.special_tokens, tool_format)
        with_tools = tool_template(template, checkpoint.tool_use_template, tool_format)
        self._tool_template = ChatTemplate(with_tools, checkpoint.special_tokens, tool_format)
        bos_token = checkpoint.special_tokens.get("bos_token")
        self._bos_id: int | None = self._tokenizer.token_to_id(bos_token) if bos_token else None

    def encode(self, inputs: Mapping[str, Array], add_special_tokens: bool = True) -> tuple[list[int], str]:
        """The ids of the only prompt among the inputs, and the name of its input."""
        prompts = [name for name in _PROMPTS if name in inputs]
        if len(prompts) != 1:
            received = f"got {' and '.join(prompts)}" if prompts else "got none"
            raise InvalidRequest(
                f"exactly one of {', '.join(_PROMPTS)} is needed ({received})", (prompts or _PROMPTS)[0]
            )
        name = prompts[0]
        if name != TEXT_INPUT.name and not add_special_tokens:
            raise InvalidRequest(
                "add_special_tokens applies to a text prompt only; ids and chats never get special tokens",
                "add_special_tokens",
            )
        if name == INPUT_IDS.name:
            return self.from_ids([int(token_id) for token_id in inputs[name].reshape(-1)]), name
        if name == TEXT_INPUT.name:
            return self.from_text(text_of(TEXT_INPUT, inputs) or "", add_special_tokens), name
        return self.from_messages(text_of(MESSAGES, inputs) or ""), name

    def from_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = self._encode(text, TEXT_INPUT.name, add_special_tokens)
        if not ids and self._bos_id is not None and add_special_tokens:
            ids = [self._bos_id]
        if not ids:
            raise InvalidRequest("text_input is empty, and this model has no bos_token; send a text", "text_input")
        return ids

    def from_ids(self, ids: list[int]) -> list[int]:
        if not ids:
            raise InvalidRequest("input_ids is empty; send at least one token id", INPUT_IDS.name)
        return ids

    def render(self, messages_json: str) -> str:
        self._chat_template.check_offered()
        chat = read_chat(messages_json)
        return (self._tool_template if chat.tools else self._chat_template).render(chat)

    def from_messages(self, messages_json: str) -> list[int]:
        rendered = self.render(messages_json)
        # The template writes the special tokens itself.
        ids = self._encode(rendered, MESSAGES.name, add_special_tokens=False)
        if not ids:
            raise InvalidRequest(
                "this model's chat template renders an empty prompt from these messages", MESSAGES.name
            )
        return ids

    def _encode(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                f"{param} holds an unpaired surrogate, which is not a valid character", param
            ) from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids


def _load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    tokenizer = load_tokenizer(checkpoint)
    # Settings from the training of the tokenizer: they would truncate or pad prompts silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _flag(inputs: Mapping[str, Array], name: str, default: bool) -> bool:
    return bool(inputs[name].reshape(-1)[0]) if name in inputs else default
