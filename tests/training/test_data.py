"""Training data: correct sums, distinct stories, and user files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tritonlm.training.data import abacus, fable, files
from tritonlm.training.errors import TrainingError
from tritonlm.training.examples import IGNORED
from tritonlm.training.tokenizer import character_tokenizer, train_bpe

TEXT = "Zoë saw 猫 and 👍🏽 in the wood. " * 30


class TestAbacus:
    def test_examples_are_correct_sums_with_labels_on_the_answer_only(self) -> None:
        data = abacus.load()
        for examples in (data.held_out, data.train):
            for row in random.Random(1).sample(range(len(examples)), 500):
                text = data.tokenizer.decode(examples.ids[row][: examples.lengths[row]])
                question, answer = text.removesuffix("<|endoftext|>").split("=")
                first, second = question.split("+")
                assert int(first) + int(second) == int(answer)
                assert (first, second, answer) == (str(int(first)), str(int(second)), str(int(answer)))
                labelled = examples.ids[row][examples.labels[row] != IGNORED]
                assert data.tokenizer.decode(labelled) == f"{answer}<|endoftext|>"

    def test_held_out_sums_are_not_in_the_training_set(self) -> None:
        (first, second), (others, partners) = abacus.split()
        held_out, train = set(zip(first, second, strict=True)), set(zip(others, partners, strict=True))
        assert (len(held_out), len(train)) == (2000, 998_000)
        assert not held_out & train

    def test_the_tokenizer_has_32_ids_and_round_trips_prompts(self) -> None:
        tokenizer = abacus.load().tokenizer
        assert len(tokenizer) == 32
        for text in ("123+456=", "H+B=", "123\n456\n"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


class TestFable:
    def test_a_hundred_stories_have_distinct_plans(self) -> None:
        for seed in range(20):
            plans = [story.plan for story in fable.stories(100, seed, held_out=False)]
            assert len(set(plans)) == 100

    def test_every_story_contains_its_words_and_no_unfilled_field(self) -> None:
        for story in fable.stories(2000, 3, held_out=False):
            assert story.kind in story.text
            assert story.thing in story.text
            assert "{" not in story.text

    def test_held_out_pairs_are_in_no_training_story(self) -> None:
        held_out = set(fable.held_out_pairs())
        assert not held_out & {(story.kind, story.thing) for story in fable.stories(5000, 0, held_out=False)}
        assert {(story.kind, story.thing) for story in fable.stories(500, 0, held_out=True)} <= held_out

    def test_stories_contain_characters_of_two_to_four_bytes(self) -> None:
        text = "".join(story.text for story in fable.stories(300, 0, held_out=False))
        assert {2, 3, 4} <= {len(character.encode()) for character in text}

    def test_seven_in_eight_stories_follow_a_request(self) -> None:
        data = fable.load(0, 100, 600)
        user_id = data.tokenizer.convert_tokens_to_ids(fable.USER)
        assert sum(row[0] == user_id for row in data.train.ids) == 87
        request = data.tokenizer.apply_chat_template(
            [{"role": "user", "content": fable.story_request("owl", "map")}], tokenize=False, add_generation_prompt=True
        )
        assert request == "<|user|>Tell me a story about an owl and a map<|assistant|>"
        row = data.train.ids[1][: data.train.lengths[1]]
        assert data.tokenizer.decode(row).startswith("<|user|>Tell me a story about a")


class TestFiles:
    def test_text_folder_and_jsonl_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "one.txt").write_text(f"{TEXT}\n\n{TEXT}", encoding="utf-8")
        rows = [{"text": "third"}, {"prompt": "what?", "completion": "that"}]
        (tmp_path / "two.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        documents = files.read_documents(str(tmp_path))
        assert [(document.prompt, document.text[:5]) for document in documents] == [
            (None, "Zoë s"), (None, "Zoë s"), (None, "third"), ("what?", "that"),
        ]  # fmt: skip

    def test_a_hub_data_set_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / "train.parquet").write_bytes(_parquet(["first", "second"]))
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        assert [document.text for document in files._from_hub(str(folder))] == ["first", "second"]

    def test_texts_are_concatenated_and_prompts_have_no_labels(self) -> None:
        tokenizer = character_tokenizer("abcdefgh ")
        documents = [files.Document("abc"), files.Document("de"), files.Document("fg", "ab")]
        examples = files.encode(documents, files.Encoding(tokenizer, 4))
        ends = tokenizer.eos_token_id
        rows = [list(row[:length]) for row, length in zip(examples.ids, examples.lengths, strict=True)]
        ids = tokenizer.convert_tokens_to_ids
        assert rows == [[*ids(list("ab")), *ids(list("fg"))], [*ids(list("abc")), ends], [*ids(list("de")), ends]]
        assert next(list(labels != IGNORED) for labels in examples.labels) == [False, False, True, True]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2 must be"),
            ("a.jsonl", "{\n", "line 1 is not valid JSON"),
            ("a.txt", "short", "too little text"),
            ("a.txt", b"\xff\xfe\xff", "cannot be read as UTF-8"),
        ],
    )
    def test_an_error_names_its_location(self, tmp_path: Path, name: str, content: object, message: str) -> None:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else str(content).encode())
        with pytest.raises(TrainingError, match=message) as error:
            files.read_documents(str(file))
        assert "\n" not in str(error.value)


def test_trained_bpe_round_trips_text() -> None:
    tokenizer = train_bpe([TEXT], 300)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def _parquet(texts: list[str]) -> bytes:
    import io  # noqa: PLC0415

    import pyarrow  # noqa: PLC0415 (slow to import)
    from pyarrow import parquet  # noqa: PLC0415

    output = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), output)
    return output.getvalue()
