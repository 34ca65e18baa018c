"""The released text equals the tokenizer's decoding of the whole text, for all splits, stop strings and times."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from engine.output.release import LONG_CONTEXT, TextRelease, Window
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_zoo import PIECES, TEXT, TOKENIZERS, byte_ids, byte_level, decode, split, token_id

BAD = "\ufffd"
examples = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
texts = st.lists(st.sampled_from(PIECES) | st.text(alphabet="ab# é猫👍\u0301", max_size=4), max_size=10).map("".join)
stop_lists = st.lists(
    st.text(alphabet="ab# é猫👍\u0301", min_size=1, max_size=4) | st.sampled_from(PIECES), max_size=3, unique=True
)

WRITERS = ("byte-level", "llama-like", "metaspace", "characters")
each = pytest.mark.parametrize("name", TOKENIZERS)
each_writer = pytest.mark.parametrize("name", WRITERS)


def generated_text(name: str, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The whole text without the prompt's, but with a character that begins in the prompt and ends after it."""
    before, whole = decode(name, prompt), decode(name, [*prompt, *ids])
    common = 0
    while common < min(len(before), len(whole)) and before[common] == whole[common]:
        common += 1
    assert not before[common:].strip(BAD)
    return whole[common:]


def is_prefix_stable(name: str, ids: Sequence[int]) -> bool:
    """Whether complete characters stay the same when tokens are added. Otherwise no stream can equal the whole text."""
    whole = decode(name, ids)
    return all(whole.startswith(decode(name, ids[:end]).rstrip(BAD)) for end in range(len(ids)))


class Stream:
    """A caller that takes windows at given times and joins their texts, as `detokenize` does."""

    def __init__(self, name: str, prompt: Sequence[int], **options: object) -> None:
        self.name = name
        self.release = TextRelease(lambda ids: decode(name, ids), prompt, **options)  # type: ignore[arg-type]
        self.all_ids = list(prompt)
        self.text = ""
        self.counted = 0
        self.stopped = False

    def see(self, window: Window | None) -> str:
        if window is None:
            return ""
        text = decode(self.name, window.ids)
        assert window.cut_start >= 0
        assert window.cut_end >= 0
        assert window.cut_start + window.cut_end <= len(text)
        assert self.all_ids[len(self.all_ids) - len(window.ids) :] == window.ids
        assert 0 <= window.new <= len(window.ids)
        shown = text[window.cut_start : len(text) - window.cut_end]
        self.counted += window.new
        self.text += shown
        return shown

    def feed(self, ids: Sequence[int], take: Callable[[int], bool] = lambda step: True) -> Stream:
        for step, new_id in enumerate(ids):
            self.all_ids.append(new_id)
            self.stopped = self.release.feed(new_id)
            if take(step):
                self.see(self.release.take())
            if self.stopped:
                break
        return self

    def end(self) -> str:
        self.see(self.release.flush())
        return self.text


def never(step: int) -> bool:
    return False


def first_stop(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first completed stop string (the longest, if several complete together); None: no stop."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return text[: end - max(map(len, completed))]
    return None


@each_writer
@examples
@given(prompt=texts, text=texts, seed=st.integers(0, 2**16))
def test_a_stream_equals_the_whole_text_for_every_split(name: str, prompt: str, text: str, seed: int) -> None:
    ids = split(name, prompt + text, seed)
    cut = random.Random(seed).randint(0, len(ids))  # a prompt of raw ids may end inside a character
    before, ids = ids[:cut], ids[cut:]
    assert is_prefix_stable(name, [*before, *ids])
    expected = generated_text(name, before, ids)
    stream = Stream(name, before)
    for new_id in ids:
        stream.feed([new_id])
        assert expected.startswith(stream.text)
    assert stream.end() == expected
    assert stream.counted == len(ids)
    unstreamed = Stream(name, before).feed(ids, take=never)
    assert unstreamed.end() == expected
    assert unstreamed.counted == len(ids)


@each
@examples
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_random_ids_with_windows_at_random_times(name: str, data: st.DataObject, seed: int) -> None:
    size = TOKENIZERS[name]().get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=40))
    cut = data.draw(st.integers(0, min(6, len(ids))))
    before, ids = ids[:cut], ids[cut:]
    moments = random.Random(seed)
    stream = Stream(name, before).feed(ids, take=lambda step: moments.random() < 0.4)
    every = Stream(name, before).feed(ids)
    stream.end()
    every.end()
    assert stream.counted == every.counted == len(ids)
    if is_prefix_stable(name, [*before, *ids]):
        assert stream.text == every.text == generated_text(name, before, ids)


@each_writer
@examples
@given(prompt=texts, text=texts, stops=stop_lists, seed=st.integers(0, 2**16))
def test_text_ends_before_the_first_stop_string(name: str, prompt: str, text: str, stops: list[str], seed: int) -> None:
    before, ids = split(name, prompt, seed), split(name, text, seed + 1)
    whole = generated_text(name, before, ids)
    expected = first_stop(whole, stops)
    stream = Stream(name, before, stops=stops)
    for new_id in ids:
        stream.feed([new_id])
        assert (whole if expected is None else expected).startswith(stream.text)
        if stream.stopped:
            break
    assert stream.end() == (whole if expected is None else expected)
    if stream.stopped:
        assert expected is not None
    moments = random.Random(seed)
    sometimes = Stream(name, before, stops=stops).feed(ids, take=lambda step: moments.random() < 0.3)
    assert sometimes.end() == stream.text
    assert sometimes.counted == stream.counted


@each_writer
@examples
@given(text=texts, stops=stop_lists, minimum=st.integers(0, 12), seed=st.integers(0, 2**16))
def test_a_stop_string_before_min_tokens_is_ignored(
    name: str, text: str, stops: list[str], minimum: int, seed: int
) -> None:
    ids = split(name, text, seed)
    known = {fed: len(decode(name, ids[:fed]).rstrip(BAD)) for fed in range(len(ids) + 1)}
    whole = decode(name, ids)
    expected = whole
    for end in range(1, len(whole) + 1):
        fed = next((fed for fed, length in known.items() if length >= end), len(ids))
        completed = [stop for stop in stops if whole[:end].endswith(stop)]
        if completed and fed >= minimum:
            expected = whole[: end - max(map(len, completed))]
            break
    assert Stream(name, [], stops=stops, min_tokens=minimum).feed(ids).end() == expected


@each_writer
@examples
@given(prompt=texts, text=texts, stops=stop_lists, seed=st.integers(0, 2**16))
def test_a_shown_prompt_comes_first_and_is_not_searched_for_stops(
    name: str, prompt: str, text: str, stops: list[str], seed: int
) -> None:
    both = split(name, prompt + text, seed)
    cut = random.Random(seed).randint(0, len(both))
    before, ids = both[:cut], both[cut:]
    answer = generated_text(name, before, ids)
    shown = decode(name, both)[: len(decode(name, both)) - len(answer)]
    stream = Stream(name, before, stops=stops, show_prompt=True)
    stream.see(stream.release.take())
    assert stream.text == decode(name, before).rstrip(BAD)
    stopped = first_stop(answer, stops)
    assert stream.feed(ids).end() == shown + (answer if stopped is None else stopped)
    assert stream.counted == len(stream.all_ids) - len(before)


@each
@examples
@given(data=st.data(), stops=stop_lists, show=st.booleans())
def test_a_resumed_text_continues_at_every_cut(name: str, data: st.DataObject, stops: list[str], show: bool) -> None:
    size = TOKENIZERS[name]().get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=14))
    cut = data.draw(st.integers(0, min(4, len(ids))))
    before, ids = ids[:cut], ids[cut:]
    stable = is_prefix_stable(name, [*before, *ids])
    for resume in range(len(ids) + 1):
        first = Stream(name, before, stops=stops, show_prompt=show).feed(ids[:resume])
        second = Stream(name, before, stops=stops, show_prompt=show).feed(ids[:resume], take=never)
        for stream in (first, second):
            stream.see(stream.release.take())
        if first.counted < resume and name == "llama-like":
            continue  # no window ends here, within a run of bytes that may become valid again
        if stable:
            assert first.text == second.text
        if first.stopped:
            break
        first.text = second.text = ""
        first.feed(ids[resume:]).end()
        second.feed(ids[resume:]).end()
        assert not stable or first.text == second.text


def test_sent_characters_stay_when_their_byte_run_turns_invalid() -> None:
    broken = [*byte_ids("éé"), byte_ids("é")[0]]
    stream = Stream("llama-like", []).feed(broken)
    assert stream.text == "éé"
    stream.feed([token_id("llama-like", "a")])
    shown = stream.end()
    assert shown.startswith("éé")
    assert shown.endswith("a")
    assert shown.count("é") == 2
    assert shown.count("a") == 1


def test_an_unfinished_character_is_released_at_the_end() -> None:
    ids = byte_level().encode("ab 👍").ids
    first_byte = token_id("byte-level", "ð")
    stream = Stream("byte-level", ids).feed([first_byte])
    assert stream.text == ""
    assert stream.end() == BAD


def test_a_character_begun_in_the_prompt_belongs_to_the_generated_text() -> None:
    whole = byte_ids("猫")
    assert Stream("llama-like", whole[:2]).feed(whole[2:]).end() == "猫"
    unfinished = whole[:2]  # not completed after the prompt: its replacement characters belong to the prompt
    assert Stream("llama-like", unfinished).feed([token_id("llama-like", "a")]).end() == "a"


@pytest.mark.parametrize("name", ["llama-like", "metaspace"])
def test_the_first_tokens_space_stays_after_a_prompt(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode("the fox").ids
    prompt = tokenizer.encode("hello").ids
    assert Stream(name, prompt).feed(ids).end() == " the fox"
    assert Stream(name, []).feed(ids).end() == "the fox"
    special = token_id(name, "<s>")
    assert Stream(name, [*prompt, special, special]).feed(ids).end() == " the fox"
    assert Stream(name, [special] * 12).feed(ids).end() == "the fox"


def test_a_part_of_a_token_can_be_released() -> None:
    """If the end of a token may begin a stop string, the text before it is released."""
    tokenizer = byte_level()
    ids = [token_id("byte-level", part) for part in ("f", "o", "x")]
    stream = Stream("byte-level", [], stops=["xyz"]).feed(ids)
    assert stream.text == "fo"
    hello = tokenizer.encode(" hello").ids
    assert len(hello) == 1
    stream = Stream("byte-level", [], stops=["lob"]).feed(hello)
    assert stream.text == " hel"
    assert stream.end() == " hello"


def test_the_longest_of_several_completed_stop_strings_is_cut() -> None:
    ids = split("characters", "abab##b", 0)
    stream = Stream("characters", [], stops=["#", "b#", "##b"]).feed(ids)
    assert stream.stopped
    assert stream.text == "aba"
    assert stream.end() == "aba"
    assert stream.counted == 5
    assert stream.release.stop == "b#"


def test_a_stop_string_that_overlaps_an_ignored_one_counts() -> None:
    ids = split("characters", "aaa", 0)
    assert Stream("characters", [], stops=["aa"], min_tokens=3).feed(ids).end() == "a"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("stops", [[], ["never seen ###"]])
def test_windows_and_decoded_contexts_stay_short(name: str, stops: list[str]) -> None:
    lengths: list[int] = []

    def counting(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(name, ids)

    ids = TOKENIZERS[name]().encode(TEXT * 8).ids
    prompt = ids * 2
    release = TextRelease(counting, prompt, stops=stops)
    lengths.clear()
    windows = []
    for new_id in ids:
        release.feed(new_id)
        if window := release.take():
            windows.append(window)
    longest = 8 * LONG_CONTEXT
    assert max(len(window.ids) for window in windows) <= longest
    assert max(lengths) <= longest
    assert sum(lengths) <= 4 * LONG_CONTEXT * len(ids)
