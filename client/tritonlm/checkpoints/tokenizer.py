"""Loads a checkpoint's tokenizer, complete or for decoding only, with little peak memory.

Encoding needs a BPE tokenizer's merges; decoding does not. This module knows the `tokenizers` library and
tokenizer.json, and nothing of what is done with the ids.
"""

from __future__ import annotations

import ctypes
import re

from tokenizers import Tokenizer

from tritonlm.contract import Checkpoint, CheckpointError

_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
# One merge: "a b", or ["a", "b"] since tokens may hold spaces.
_MERGE = rb"\s*(?:%b|\[\s*%b\s*,\s*%b\s*\])\s*" % (_STRING, _STRING, _STRING)
# Only the field itself matches: inside a string the quotes would be escaped.
_MERGES_BEGIN = re.compile(rb'"merges"\s*:\s*\[')
# Matched in groups of 500, since `re` stores a backtracking point for each repetition.
_SOME_MERGES = re.compile(rb"(?:%b,){1,500}" % _MERGE)
_MERGES_END = re.compile(rb"(?:%b|\s*)\]" % _MERGE)
# Merges as the library itself indents them. Strings hold no line breaks, so these cannot occur inside one.
_PAIR_BEGIN, _PAIR_MIDDLE, _PAIR_END = b'\n      [\n        "', b'",\n        "', b'"\n      ]'
_BETWEEN_PAIRS = _PAIR_END + b"," + _PAIR_BEGIN
_MERGES_INDENTED_END = b"\n    ]"


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The complete tokenizer: text to ids and ids to text."""
    tokenizer = _parse(checkpoint, with_merges_as_lines(_read(checkpoint)))
    _trim_heap()
    return tokenizer


def load_decoder(checkpoint: Checkpoint) -> Tokenizer:
    """A tokenizer that only decodes, with the same results. It is smaller and loads in half the time."""
    tokenizer = _parse(checkpoint, without_merges(_read(checkpoint)))
    _trim_heap()
    return tokenizer


def without_merges(specification: bytes) -> bytes:
    """A tokenizer.json with an empty list of merges; unchanged if it has none or writes them in an unknown format."""
    begin = _MERGES_BEGIN.search(specification)
    if begin is None:
        return specification
    position = begin.end()
    while match := _SOME_MERGES.match(specification, position):
        position = match.end()
    end = _MERGES_END.match(specification, position)
    return specification if end is None else specification[: begin.end()] + specification[end.end() - 1 :]


def with_merges_as_lines(specification: bytes) -> bytes:
    """The same tokenizer.json with each merge written as "a b" instead of ["a", "b"], if no merged token has a space.

    Parsing it takes less than half of the memory and fragments the heap less.
    """
    begin = _MERGES_BEGIN.search(specification)
    end = specification.find(_MERGES_INDENTED_END, begin.end()) if begin is not None else -1
    if begin is None or end < 0:
        return specification
    merges = specification[begin.end() : end]
    if not (merges.startswith(_PAIR_BEGIN) and merges.endswith(_PAIR_END)):
        return specification
    lines = merges[len(_PAIR_BEGIN) : -len(_PAIR_END)].replace(_BETWEEN_PAIRS, b'",\n"').replace(_PAIR_MIDDLE, b" ")
    other_spaces = lines.count(b" ") != lines.count(b"\n") + 1 or b"\\u0020" in lines
    # A line that begins with #version is a comment.
    if other_spaces or b"#version" in lines:
        return specification
    return b"".join((specification[: begin.end()], b'"', lines, b'"', specification[end:]))


def _read(checkpoint: Checkpoint) -> bytes:
    try:
        return checkpoint.tokenizer_file.read_bytes()
    except OSError as error:
        raise _unreadable(checkpoint, error) from error


def _parse(checkpoint: Checkpoint, specification: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(specification)
    except Exception as error:  # the library raises nothing narrower
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(f"{checkpoint.tokenizer_file} cannot be read: {error}")


def _trim_heap() -> None:
    """Return free pages to the system: after parsing, glibc keeps twice the tokenizer's own memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
