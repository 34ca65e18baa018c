"""User data: a text file, a JSONL file, a folder of either, or a data set on the Hugging Face Hub.

A JSONL row is `{"text": …}`, `{"prompt": …, "completion": …}` or `{"messages": …}`; the loss covers completions and the
assistant's messages. Texts are concatenated and cut into rows as long as the context; each other row is an example.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..errors import TrainingError
from ..examples import Example, Examples
from . import Data
from .chats import Chat, ChatEncoder, read_chat

HELD_OUT_SHARE = 0.05
_SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Document:
    text: str
    # The text before it, without labels; None: a plain text.
    prompt: str | None = None


def read_documents(source: str) -> list[Document | Chat]:
    path = Path(source).expanduser()
    documents = list(_from_path(path)) if path.exists() else list(_from_hub(source))
    if len(documents) < 2 and not any(isinstance(one, Document) and len(one.text) > 200 for one in documents):
        raise TrainingError(f"data: {source} has too little text: give two documents, or more than 200 characters")
    return documents


def _from_path(path: Path) -> Iterator[Document | Chat]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise TrainingError(f"data: the folder {path} has no file that ends in {', '.join(_SUFFIXES)}")
        for file in files:
            yield from _from_path(file)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"data: {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        # Split into paragraphs, so that a part of a single file can be held out.
        yield from (Document(part) for part in text.split("\n\n") if part.strip())
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TrainingError(f"data: {path}, line {number} is not valid JSON: {error}") from None
            yield _from_row(row, f"{path}, line {number}")


def _from_row(row: Any, location: str) -> Document | Chat:
    fields = row if isinstance(row, dict) else {}
    if "messages" in fields:
        return read_chat(fields, location)
    if isinstance(fields.get("text"), str):
        return Document(fields["text"])
    if isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        return Document(fields["completion"], fields["prompt"])
    raise TrainingError(
        f'data: {location} must be {{"text": …}}, {{"prompt": …, "completion": …}} or {{"messages": […]}}'
    )


def _from_hub(source: str) -> Iterator[Document | Chat]:
    try:
        import datasets  # noqa: PLC0415 (an extra, and slow to import)
    except ModuleNotFoundError:
        raise TrainingError(
            f"data: {source} is not a file here; a data set on the Hub needs the package datasets: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(source, split="train")
    except Exception as error:  # datasets raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"data: {source} is neither a file here nor a data set on the Hub: {reason}") from None
    for number, row in enumerate(loaded):
        yield _from_row(dict(row), f"{source}, row {number}")


@dataclass(frozen=True)
class Encoding:
    """How documents become rows."""

    tokenizer: PreTrainedTokenizerFast
    # The longest row in tokens.
    context: int
    # The tokens that end an answer in a chat.
    end_ids: frozenset[int] = frozenset()
    # Several examples in a row.
    packing: bool = False


def load(name: str, documents: Sequence[Document | Chat], encoding: Encoding, seed: int) -> Data:
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    count = max(1, round(len(shuffled) * HELD_OUT_SHARE))
    held_out, train = shuffled[:count], shuffled[count:] or shuffled
    # Held-out examples have a row each, so that the exact ones can be counted.
    return Data(
        name,
        encode(train, encoding),
        encode(held_out, dataclasses.replace(encoding, packing=False)),
        encoding.tokenizer,
        f"{len(train):,} documents of {name}; {len(held_out):,} are held out",
        accuracy="held-out chats with exactly the expected answers" if isinstance(held_out[0], Chat) else "",
        prompts=[_opening(train[0], encoding)],
    )


def _opening(document: Document | Chat, encoding: Encoding) -> str:
    if isinstance(document, Chat):
        return _chat_encoder(encoding).prompt(document)
    return (document.prompt or document.text)[:60]


def encode(documents: Iterable[Document | Chat], encoding: Encoding) -> Examples:
    tokenizer, context = encoding.tokenizer, encoding.context
    end: int = tokenizer.eos_token_id
    examples: list[Example] = []
    joined: list[int] = []
    chats: ChatEncoder | None = None
    for document in documents:
        if isinstance(document, Chat):
            chats = chats or _chat_encoder(encoding)
            examples += chats.examples(document)
            continue
        body = [*tokenizer.encode(document.text, add_special_tokens=False), end]
        if document.prompt is None:
            joined += body
            continue
        prompt = tokenizer.encode(document.prompt, add_special_tokens=False)
        # A long prompt is cut to its end, so that the row keeps a part of the completion.
        prompt = prompt[-(context // 2) :]
        examples.append(Example.after(len(prompt), [*prompt, *body][:context]))
    for start in range(0, len(joined), context):
        if len(part := joined[start : start + context]) > 1:
            examples.append(Example.after(0, part))
    return Examples.packed(examples, context) if encoding.packing else Examples.padded(examples)


def _chat_encoder(encoding: Encoding) -> ChatEncoder:
    return ChatEncoder(encoding.tokenizer, encoding.end_ids, encoding.context)
