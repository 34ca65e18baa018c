"""Short stories from a grammar: a character, a wish, an obstacle, two tries, help, a turn and an ending.

Each part is sampled from a dozen sentences, so that two stories rarely have the same plan. Names with accents or in
other scripts and emoji in the endings produce characters of several bytes in streams.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..examples import Examples
from ..tokenizer import train_bpe
from . import Data
from .fable_words import ADJECTIVES, KINDS, MATERIALS, NAMES, PARTS, PLACES, THINGS

USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<|assistant|>' + message.content + eos_token }}{% else %}"
    "{{ '<|user|>' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Pairs of a kind and a thing that occur in no training story.
HELD_OUT_PAIRS = 160
HELD_OUT_STORIES = 400
# Held-out pairs with which the finished model is evaluated.
EVALUATED_PAIRS = 100
_STORY_TOKENS = 220


@dataclass(frozen=True)
class Story:
    kind: str
    thing: str
    # The index of the sentence of each part; stories with equal plans differ only in their words.
    plan: tuple[int, ...]
    text: str


def story_request(kind: str, thing: str) -> str:
    return f"Tell me a story about {article(kind)} {kind} and {article(thing)} {thing}"


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def held_out_pairs(seed: int = 0) -> list[tuple[str, str]]:
    pairs = [(kind, thing) for kind in KINDS for thing in THINGS]
    return random.Random(f"pairs {seed}").sample(pairs, HELD_OUT_PAIRS)


def make_story(rng: random.Random, kind: str, thing: str) -> Story:
    name, friend = rng.sample(NAMES, 2)
    she, her, him = rng.choice([("she", "her", "her"), ("he", "his", "him")])
    words = {
        "name": name, "kind": kind, "thing": thing, "friend": friend,
        "other": rng.choice([other for other in KINDS if other != kind]),
        "place": rng.choice(PLACES), "adjective": rng.choice(ADJECTIVES), "material": rng.choice(MATERIALS),
        "she": she, "She": she.capitalize(), "her": her, "Her": her.capitalize(), "him": him,
    }  # fmt: skip
    for noun in ("kind", "thing", "other", "adjective", "material"):
        words[f"a_{noun}"] = f"{article(words[noun])} {words[noun]}"
    plan = tuple(rng.randrange(len(part)) for part in PARTS)
    text = " ".join(part[choice].format(**words) for part, choice in zip(PARTS, plan, strict=True) if part[choice])
    return Story(kind, thing, plan, text)


def stories(count: int, seed: int, held_out: bool) -> list[Story]:
    rng, reserved = random.Random(f"stories {seed} {held_out}"), held_out_pairs(seed)
    reserved_set = set(reserved)
    result: list[Story] = []
    while len(result) < count:
        pair = rng.choice(reserved) if held_out else (rng.choice(KINDS), rng.choice(THINGS))
        if held_out or pair not in reserved_set:
            result.append(make_story(rng, *pair))
    return result


def load(seed: int, count: int, vocabulary: int) -> Data:
    train, held_out = stories(count, seed, held_out=False), stories(HELD_OUT_STORIES, seed, held_out=True)
    tokenizer = train_bpe((story.text for story in train[:8000]), vocabulary, (USER, ASSISTANT))
    tokenizer.chat_template = CHAT_TEMPLATE
    return Data(
        "fable",
        encode(train, tokenizer),
        encode(held_out, tokenizer),
        tokenizer,
        f"{count:,} short stories from a grammar; {HELD_OUT_PAIRS} pairs of a character and a thing are held out",
        accuracy=f"{EVALUATED_PAIRS} stories, requested with a held-out pair, that contain both words",
        evaluate=lambda model: share_with_both_words(model, tokenizer, held_out_pairs(seed)[:EVALUATED_PAIRS]),
        prompts=["Once upon a time", f"{USER}{story_request('fox', 'lantern')}{ASSISTANT}"],
    )


def encode(selected: Sequence[Story], tokenizer: PreTrainedTokenizerFast) -> Examples:
    """Seven in eight stories follow a request, which has no labels; the others have no prompt.

    With a smaller share, the model learns much later to use the words of the request.
    """
    end: int = tokenizer.eos_token_id
    sequences, prompt_lengths = [], []
    bodies = tokenizer([story.text for story in selected], add_special_tokens=False)["input_ids"]
    requests = [f"{USER}{story_request(story.kind, story.thing)}{ASSISTANT}" for story in selected]
    heads = tokenizer(requests, add_special_tokens=False)["input_ids"]
    for number, (head, body) in enumerate(zip(heads, bodies, strict=True)):
        prompt = head if number % 8 else []
        sequences.append([*prompt, *body, end])
        prompt_lengths.append(len(prompt))
    return Examples.from_sequences(sequences, prompt_lengths)


@torch.inference_mode()
def share_with_both_words(model: Any, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> float:
    """The share of requested stories, generated greedily, that contain both words of the request."""
    groups: dict[int, list[tuple[tuple[str, str], list[int]]]] = {}
    for pair in pairs:
        ids = tokenizer(f"{USER}{story_request(*pair)}{ASSISTANT}", add_special_tokens=False)["input_ids"]
        # Grouped by length, so that no prompt needs padding.
        groups.setdefault(len(ids), []).append((pair, ids))
    complete = 0
    for length, group in groups.items():
        max_new_tokens = min(_STORY_TOKENS, model.config.max_position_embeddings - length)
        ids = torch.tensor([ids for _, ids in group], device=model.device)
        end = tokenizer.eos_token_id
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=end,
        )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        complete += sum(all(word in text for word in pair) for (pair, _), text in zip(group, texts, strict=True))
    return complete / len(pairs)
