"""User data: a text file, a JSONL file, a folder of either, or a data set on the Hugging Face Hub.

A JSONL row is `{"text": …}` or `{"prompt": …, "completion": …}`; the loss covers the completion. Texts are
concatenated and cut into rows as long as the context; each prompt and completion is a row of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..errors import TrainingError
from ..examples import Examples
from . import Data

HELD_OUT_SHARE = 0.05
_SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Document:
    text: str
    # The text before it, without labels; None: a plain text.
    prompt: str | None = None


def read_documents(source: str) -> list[Document]:
    path = Path(source).expanduser()
    documents = list(_from_path(path)) if path.exists() else list(_from_hub(source))
    if len(documents) < 2 and not any(len(document.text) > 200 for document in documents):
        raise TrainingError(f"data: {source} has too little text: give two documents, or more than 200 characters")
    return documents


def _from_path(path: Path) -> Iterator[Document]:
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


def _from_row(row: Any, location: str) -> Document:
    fields = row if isinstance(row, dict) else {}
    if isinstance(fields.get("text"), str):
        return Document(fields["text"])
    if isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        return Document(fields["completion"], fields["prompt"])
    raise TrainingError(f'data: {location} must be {{"text": …}} or {{"prompt": …, "completion": …}}')


def _from_hub(source: str) -> Iterator[Document]:
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


def load(name: str, documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, context: int, seed: int) -> Data:
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    count = max(1, round(len(shuffled) * HELD_OUT_SHARE))
    held_out, train = shuffled[:count], shuffled[count:] or shuffled
    opening = next((document.prompt or document.text for document in train), "")
    return Data(
        name,
        encode(train, tokenizer, context),
        encode(held_out, tokenizer, context),
        tokenizer,
        f"{len(train):,} documents of {name}; {len(held_out):,} are held out",
        prompts=[opening[:60]],
    )


def encode(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, context: int) -> Examples:
    end: int = tokenizer.eos_token_id
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    joined: list[int] = []
    for document in documents:
        body = [*tokenizer.encode(document.text, add_special_tokens=False), end]
        if document.prompt is None:
            joined += body
            continue
        prompt = tokenizer.encode(document.prompt, add_special_tokens=False)
        # A long prompt is cut to its end, so that the row keeps a part of the completion.
        row = [*prompt[-(context // 2) :], *body][:context]
        rows.append(row)
        prompt_lengths.append(min(len(prompt), context // 2))
    for start in range(0, len(joined), context):
        if len(part := joined[start : start + context]) > 1:
            rows.append(part)
            prompt_lengths.append(0)
    return Examples.from_sequences(rows, prompt_lengths)
