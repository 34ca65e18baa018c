"""Data of one's own: a text file, a JSONL file, a folder of either, or a data set on the Hugging Face Hub.

A JSONL row is `{"text": …}`, or `{"prompt": …, "completion": …}`, of which the completion is learnt. Texts are joined
and cut into rows as long as the context; rows of prompt and completion stay by themselves.
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
    # What comes before it, given and not learnt; None: an ordinary text.
    prompt: str | None = None


def documents(source: str) -> list[Document]:
    path = Path(source).expanduser()
    found = list(_of_path(path)) if path.exists() else list(_of_hub(source))
    if len(found) < 2 and not any(len(document.text) > 200 for document in found):
        raise TrainingError(f"data: {source} holds too little text to learn from and to hold some out")
    return found


def _of_path(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise TrainingError(f"data: the folder {path} has no file that ends in {', '.join(_SUFFIXES)}")
        for file in files:
            yield from _of_path(file)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"data: {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        # Paragraphs, so that some of even a single file can be held out.
        yield from (Document(part) for part in text.split("\n\n") if part.strip())
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TrainingError(f"data: {path}, line {number} is not valid JSON: {error}") from None
            yield _of_row(row, f"{path}, line {number}")


def _of_row(row: Any, where: str) -> Document:
    fields = row if isinstance(row, dict) else {}
    if isinstance(fields.get("text"), str):
        return Document(fields["text"])
    if isinstance(fields.get("prompt"), str) and isinstance(fields.get("completion"), str):
        return Document(fields["completion"], fields["prompt"])
    raise TrainingError(f'data: {where} must be {{"text": …}} or {{"prompt": …, "completion": …}}')


def _of_hub(source: str) -> Iterator[Document]:
    try:
        import datasets  # noqa: PLC0415 (an extra, and slow to import)
    except ModuleNotFoundError:
        raise TrainingError(
            f"data: {source} is no file here, and for the Hub the package datasets is needed: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(source, split="train")
    except Exception as error:  # it raises whatever its loaders raise
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"data: {source} is neither a file here nor a data set on the Hub: {reason}") from None
    for number, row in enumerate(loaded):
        yield _of_row(dict(row), f"{source}, row {number}")


def load(name: str, found: Sequence[Document], tokenizer: PreTrainedTokenizerFast, context: int, seed: int) -> Data:
    order = list(found)
    random.Random(seed).shuffle(order)
    away = max(1, round(len(order) * HELD_OUT_SHARE))
    held_out, train = order[:away], order[away:] or order
    opening = next((document.prompt or document.text for document in train), "")
    return Data(
        name,
        encoded(train, tokenizer, context),
        encoded(held_out, tokenizer, context),
        tokenizer,
        f"{len(train):,} documents of {name}; {len(held_out):,} are held out",
        prompts=[opening[:60]],
    )


def encoded(found: Iterable[Document], tokenizer: PreTrainedTokenizerFast, context: int) -> Examples:
    end: int = tokenizer.eos_token_id
    rows: list[list[int]] = []
    given: list[int] = []
    joined: list[int] = []
    for document in found:
        body = [*tokenizer.encode(document.text, add_special_tokens=False), end]
        if document.prompt is None:
            joined += body
            continue
        prompt = tokenizer.encode(document.prompt, add_special_tokens=False)
        # Of a prompt that is too long the end counts; a row must have something to learn.
        row = [*prompt[-(context // 2) :], *body][:context]
        rows.append(row)
        given.append(min(len(prompt), context // 2))
    for start in range(0, len(joined), context):
        if len(part := joined[start : start + context]) > 1:
            rows.append(part)
            given.append(0)
    return Examples.of(rows, given)
