"""Short stories from a grammar of our own: a character, a wish, an obstacle, two tries, help, a turn and an ending.

Each part is drawn from a dozen sentences, so that two stories hardly ever share a plan. Names have accents or are
written in other scripts, and some endings wear an emoji, so that a stream's text has characters of several bytes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ..examples import Examples
from ..tokenizer import trained_bpe
from . import Data
from .fable_words import ADJECTIVES, KINDS, MATERIALS, NAMES, PARTS, PLACES, THINGS

USER, ASSISTANT = "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<|assistant|>' + message.content + eos_token }}{% else %}"
    "{{ '<|user|>' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Pairs of a kind and a thing that no training story tells of.
HELD_OUT_PAIRS = 160
HELD_OUT_STORIES = 400
# How many of the held-out pairs the finished model is asked for.
JUDGED = 100
_STORY_TOKENS = 220


@dataclass(frozen=True)
class Story:
    kind: str
    thing: str
    # Which sentence stands for each part: two stories with one plan differ in their words alone.
    plan: tuple[int, ...]
    text: str


def request_of(kind: str, thing: str) -> str:
    return f"Tell me a story about {article(kind)} {kind} and {article(thing)} {thing}"


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def held_out_pairs(seed: int = 0) -> list[tuple[str, str]]:
    pairs = [(kind, thing) for kind in KINDS for thing in THINGS]
    return random.Random(f"pairs {seed}").sample(pairs, HELD_OUT_PAIRS)


def tell(draw: random.Random, kind: str, thing: str) -> Story:
    name, friend = draw.sample(NAMES, 2)
    she, her, him = draw.choice([("she", "her", "her"), ("he", "his", "him")])
    words = {
        "name": name, "kind": kind, "thing": thing, "friend": friend,
        "other": draw.choice([other for other in KINDS if other != kind]),
        "place": draw.choice(PLACES), "adjective": draw.choice(ADJECTIVES), "material": draw.choice(MATERIALS),
        "she": she, "She": she.capitalize(), "her": her, "Her": her.capitalize(), "him": him,
    }  # fmt: skip
    for noun in ("kind", "thing", "other", "adjective", "material"):
        words[f"a_{noun}"] = f"{article(words[noun])} {words[noun]}"
    plan = tuple(draw.randrange(len(part)) for part in PARTS)
    text = " ".join(part[choice].format(**words) for part, choice in zip(PARTS, plan, strict=True) if part[choice])
    return Story(kind, thing, plan, text)


def stories(count: int, seed: int, held_out: bool) -> list[Story]:
    draw, away = random.Random(f"stories {seed} {held_out}"), held_out_pairs(seed)
    apart = set(away)
    found: list[Story] = []
    while len(found) < count:
        pair = draw.choice(away) if held_out else (draw.choice(KINDS), draw.choice(THINGS))
        if held_out or pair not in apart:
            found.append(tell(draw, *pair))
    return found


def load(seed: int, count: int, vocabulary: int) -> Data:
    train, held_out = stories(count, seed, held_out=False), stories(HELD_OUT_STORIES, seed, held_out=True)
    tokenizer = trained_bpe((story.text for story in train[:8000]), vocabulary, (USER, ASSISTANT))
    tokenizer.chat_template = CHAT_TEMPLATE
    return Data(
        "fable",
        encoded(train, tokenizer),
        encoded(held_out, tokenizer),
        tokenizer,
        f"{count:,} short stories from a grammar; {HELD_OUT_PAIRS} pairs of a character and a thing are held out",
        accuracy=f"{JUDGED} stories, asked for with a held-out pair, that hold both words",
        judge=lambda model: share_with_both_words(model, tokenizer, held_out_pairs(seed)[:JUDGED]),
        prompts=["Once upon a time", f"{USER}{request_of('fox', 'lantern')}{ASSISTANT}"],
    )


def encoded(told: Sequence[Story], tokenizer: PreTrainedTokenizerFast) -> Examples:
    """Seven in eight are answers to a request, which is given and not learnt; the others are told unasked.

    With fewer, the words of the request are taken up into the story much later in the training.
    """
    end: int = tokenizer.eos_token_id
    sequences, given = [], []
    bodies = tokenizer([story.text for story in told], add_special_tokens=False)["input_ids"]
    asked = [f"{USER}{request_of(story.kind, story.thing)}{ASSISTANT}" for story in told]
    heads = tokenizer(asked, add_special_tokens=False)["input_ids"]
    for number, (head, body) in enumerate(zip(heads, bodies, strict=True)):
        prompt = head if number % 8 else []
        sequences.append([*prompt, *body, end])
        given.append(len(prompt))
    return Examples.of(sequences, given)


@torch.inference_mode()
def share_with_both_words(model: Any, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> float:
    """How many of the stories that are asked for, told greedily, hold what they were asked to tell of."""
    asked: dict[int, list[tuple[tuple[str, str], list[int]]]] = {}
    for pair in pairs:
        ids = tokenizer(f"{USER}{request_of(*pair)}{ASSISTANT}", add_special_tokens=False)["input_ids"]
        # Those of one length together: so none needs padding.
        asked.setdefault(len(ids), []).append((pair, ids))
    held = 0
    for length, group in asked.items():
        room = min(_STORY_TOKENS, model.config.max_position_embeddings - length)
        ids = torch.tensor([ids for _, ids in group], device=model.device)
        end = tokenizer.eos_token_id
        told = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, pad_token_id=end
        )
        texts = tokenizer.batch_decode(told[:, length:], skip_special_tokens=True)
        held += sum(all(word in text for word in pair) for (pair, _), text in zip(group, texts, strict=True))
    return held / len(pairs)
