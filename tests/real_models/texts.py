"""Prompts for a trained model. It knows plain Python."""

from __future__ import annotations

from collections.abc import Callable

PROSE = (
    "The lighthouse stood at the end of the pier, and at dusk its keeper climbed the 142 steps to light the lamp. "
    "He had done so for thirty-one years; only once, in the winter of 1962, had the storm kept him below. "
)
PROMPTS = (
    "The capital of France is",
    PROSE + "That night",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 2, 4, 8, 16, 32,",
    "猫は静かに眠る。猫は",
    "Dear Sir or Madam,\n\nI am writing to",
    "Question: What is the boiling point of water?\nAnswer:",
    '{"name": "Anna", "age": 31, "children": [{"name":',
)
CHAT = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
CHATS = (
    CHAT,
    [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Hello 👋🏽, who are you?"}],
    [*CHAT, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "<|im_end|> and of 日本?"}],
)
# Repeated lines, which even a small model continues.
PATTERNS = {
    "emoji": "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪 🎉\n" * 5,
    "cjk": "猫は静かに眠る。世界你好吗?한국어 텍스트。\n" * 5,
}


def of_length(encode: Callable[[str], list[int]], count: int) -> list[int]:
    """The first `count` token ids of numbered prose."""
    ids: list[int] = []
    chapter = 0
    while len(ids) < count:
        chapter += 1
        ids += encode(f"Chapter {chapter}. {PROSE}")
    return ids[:count]
