"""The model `detokenize`: a chunk's text, its log-probabilities by token text, and an answer whatever happens."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.output.release import TextRelease, Window
from fakes.checkpoints import END, byte_level_tokenizer, write_checkpoint
from fakes.fake_pb_utils import InferenceRequest, Logger
from fakes.models import load_module, start_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_zoo import PIECES, TOKENIZERS, split, token_id
from tokenizers import Tokenizer, decoders
from tritonlm.contract import Checkpoint, Chunk, InvalidRequest, TokenLogprob, Usage
from tritonlm.contract.errors import from_wire
from tritonlm.contract.tensors import (
    CHUNK,
    DETOKENIZE_OUTPUTS,
    FINISH_REASON,
    LOGPROBS,
    NUMPY_TYPE,
    PIECE,
    TEXT_OUTPUT,
    Array,
)

# Of the outputs a piece stands in place of all others.
WANTED = [spec.name for spec in DETOKENIZE_OUTPUTS]
APART = {*WANTED} - {PIECE.name}
TOKENIZER = byte_level_tokenizer()
examples = settings(max_examples=100, deadline=None, derandomize=True)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4),
)
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start_model("detokenize", write_checkpoint(tmp_path_factory.mktemp("repository") / "lm"))


@pytest.fixture(scope="module")
def detokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The Triton-free core, with every kind of tokenizer."""
    core, folder = load_module("detokenize", "detokenizer"), tmp_path_factory.mktemp("checkpoints")
    return {
        name: core.Detokenizer(Checkpoint(write_checkpoint(folder / name, make()))) for name, make in TOKENIZERS.items()
    }


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def id_of(token: str) -> int:
    found = TOKENIZER.token_to_id(token)
    assert found is not None
    return found


def byte_ids_of(text: str) -> list[int]:
    """The text as one token per byte."""
    alphabet = load_module("detokenize", "pieces")._BYTE_OF
    spelled = {byte: character for character, byte in alphabet.items()}
    return [id_of(spelled[byte]) for byte in text.encode()]


def request_of(chunk: Chunk, wanted: Sequence[str] = WANTED, **instead: object) -> InferenceRequest:
    text = json.dumps(json.loads(chunk.to_json()) | instead)
    return InferenceRequest({CHUNK.name: CHUNK.pack(text)}, list(wanted))


def outputs(model: Any, *requests: InferenceRequest) -> list[dict[str, Array]]:
    answers = model.execute(list(requests))
    assert all(answer.error() is None for answer in answers)
    return [{tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()} for answer in answers]


def text_of(model: Any, chunk: Chunk) -> str:
    (found,) = outputs(model, request_of(chunk))
    return TEXT_OUTPUT.text(found[TEXT_OUTPUT.name])


def rows_of(model: Any, chunk: Chunk) -> list[dict[str, Any]]:
    (found,) = outputs(model, request_of(chunk))
    rows: list[dict[str, Any]] = json.loads(LOGPROBS.text(found[LOGPROBS.name]))
    return rows


class TestText:
    def test_a_window_is_cut_at_both_ends(self, model: Any) -> None:
        ids = ids_of("the fox said 猫")
        assert text_of(model, Chunk(0, ids, 1, 0, 0)) == "the fox said 猫"
        assert text_of(model, Chunk(0, ids, 1, 4, 0)) == "fox said 猫"
        assert text_of(model, Chunk(0, ids, 1, 4, 2)) == "fox said"
        assert text_of(model, Chunk(0, ids, 1, 9, 9)) == ""
        assert text_of(model, Chunk(0, [], 0, 0, 0)) == ""

    def test_special_tokens_are_left_out_or_not(self, model: Any) -> None:
        ids = [*ids_of("the fox"), id_of(END)]
        assert text_of(model, Chunk(0, ids, 1, 0, 0, skip_special_tokens=True)) == "the fox"
        assert text_of(model, Chunk(0, ids, 1, 0, 0, skip_special_tokens=False)) == f"the fox{END}"

    def test_everything_else_is_told_as_it_came(self, model: Any) -> None:
        chunk = Chunk(3, ids_of("the"), 1, 0, 0, True, "stop", Usage(4, 5, 2), [7, 8], -(2**63))
        (found,) = outputs(model, request_of(chunk))
        assert set(found) == APART
        assert {name: found[name].tolist() for name in ("chunk_index", "usage", "token_ids", "seed")} == {
            "chunk_index": [[3]],
            "usage": [[4, 5, 2]],
            "token_ids": [[7, 8]],
            "seed": [[-(2**63)]],
        }
        assert FINISH_REASON.text(found["finish_reason"]) == "stop"
        assert {name: array.dtype.name for name, array in found.items()} == {
            spec.name: NUMPY_TYPE[spec.dtype] for spec in DETOKENIZE_OUTPUTS if spec.name in APART
        }

    def test_only_the_outputs_that_are_wanted_are_made(self, model: Any) -> None:
        (found,) = outputs(model, request_of(Chunk(0, ids_of("the"), 1, 0, 0), ["seed", "text_output"]))
        assert set(found) == {"seed", "text_output"}

    def test_a_piece_holds_all_the_others(self, model: Any) -> None:
        entry = TokenLogprob(id_of(END), -0.5)
        chunk = Chunk(3, ids_of("the 猫\n"), 1, 0, 0, True, "stop", Usage(4, 5, 2), [7, 8], -(2**63), [entry])
        apart, together = outputs(model, request_of(chunk), request_of(replace(chunk, as_piece=True)))
        assert set(together) == {PIECE.name}
        found = json.loads(PIECE.text(together[PIECE.name]))
        assert found.keys() == apart.keys()
        for spec in DETOKENIZE_OUTPUTS:
            if spec.name in APART:
                assert spec.pack(found[spec.name]).tolist() == apart[spec.name].tolist(), spec.name


class TestLogprobs:
    def test_none_were_asked_for(self, model: Any) -> None:
        (found,) = outputs(model, request_of(Chunk(0, ids_of("the"), 1, 0, 0)))
        assert LOGPROBS.text(found[LOGPROBS.name]) == ""

    def test_an_entry_has_all_that_openai_names(self, model: Any) -> None:
        the, fox = ids_of("the"), ids_of(" fox")
        assert len(the) == len(fox) == 1, "the test needs whole words as tokens"
        chunk = Chunk(0, [*the, *fox], 1, 3, 0, logprobs=[TokenLogprob(fox[0], -0.5, ((fox[0], -0.5), (the[0], -2.0)))])
        named = {"id": fox[0], "token": " fox", "logprob": -0.5, "bytes": list(b" fox")}
        other = {"id": the[0], "token": "the", "logprob": -2.0, "bytes": list(b"the")}
        assert rows_of(model, chunk) == [{**named, "top": [named, other], "offset": 0}]

    def test_a_prompts_first_token_has_none(self, model: Any) -> None:
        ids = ids_of("the fox")
        chunk = Chunk(
            0, ids, len(ids), 0, 0, logprobs=[TokenLogprob(i, None if n == 0 else -1.0) for n, i in enumerate(ids)]
        )
        assert [(row["token"], row["logprob"], row["offset"]) for row in rows_of(model, chunk)] == [
            ("the", None, 0),
            (" fox", -1.0, 3),
        ]

    def test_tokens_that_are_no_text_are_named_by_their_bytes(self, model: Any) -> None:
        ids = byte_ids_of("a👍")
        chunk = Chunk(0, ids, 5, 0, 0, logprobs=[TokenLogprob(token, -1.0) for token in ids])
        assert [(row["token"], row["bytes"], row["offset"]) for row in rows_of(model, chunk)] == [
            ("a", [0x61], 0),
            ("bytes:\\xf0", [0xF0], 1),
            ("bytes:\\x9f", [0x9F], 1),
            ("bytes:\\x91", [0x91], 1),
            ("bytes:\\x8d", [0x8D], 1),
        ]

    def test_a_character_begun_in_this_chunk_begins_where_it_will_stand(self, model: Any) -> None:
        ids = byte_ids_of("a👍")[:3]
        chunk = Chunk(0, ids, 3, 0, 1, logprobs=[TokenLogprob(token, -1.0) for token in ids])
        assert text_of(model, chunk) == "a"
        assert [row["offset"] for row in rows_of(model, chunk)] == [0, 1, 1]

    def test_what_began_earlier_is_below_zero(self, model: Any) -> None:
        # "quick" left up to its third character with an earlier chunk.
        ids = [*ids_of("the"), *byte_ids_of(" quick")]
        chunk = Chunk(1, ids, 6, 6, 0, logprobs=[TokenLogprob(token, -1.0) for token in ids[1:]])
        assert text_of(model, chunk) == "ick"
        assert [row["offset"] for row in rows_of(model, chunk)] == [-3, -2, -1, 0, 1, 2]

    def test_what_is_held_back_is_beyond_the_end_unless_nothing_follows(self, model: Any) -> None:
        ids = byte_ids_of("fox###")
        entries = [TokenLogprob(token, -1.0) for token in ids]
        held, last = (Chunk(0, ids, 6, 0, 3, finish_reason=reason, logprobs=entries) for reason in ("", "stop"))
        assert [row["offset"] for row in rows_of(model, held)] == [0, 1, 2, 3, 4, 5]
        assert [row["offset"] for row in rows_of(model, last)] == [0, 1, 2, 3, 3, 3]

    def test_an_end_of_text_beyond_the_window_stands_at_the_texts_end(self, model: Any) -> None:
        end = id_of(END)
        ids = ids_of("the fox")
        entries = [TokenLogprob(token, -1.0) for token in (ids[-1], end)]
        rows = rows_of(model, Chunk(0, ids, 1, 3, 0, finish_reason="stop", logprobs=entries))
        assert [(row["token"], row["offset"]) for row in rows] == [(" fox", 0), (END, 4)]
        only_end = Chunk(1, [], 0, 0, 0, finish_reason="stop", logprobs=entries[1:])
        assert [(row["token"], row["offset"]) for row in rows_of(model, only_end)] == [(END, 0)]

    @pytest.mark.parametrize("name", sorted(TOKENIZERS))
    @examples
    @given(text=texts, seed=st.integers(0, 10**6))
    def test_in_a_stream_each_offset_points_at_its_token(
        self, detokenizers: dict[str, Any], name: str, text: str, seed: int
    ) -> None:
        prompt = TOKENIZERS[name]().encode("hello", add_special_tokens=False).ids or [token_id(name, "a")]
        check_stream(detokenizers[name], TOKENIZERS[name](), prompt, split(name, text, seed), seed)

    # Without the one that hardly has a vocabulary.
    @pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"suffixed"}))
    def test_so_it_does_in_a_long_prompt(self, detokenizers: dict[str, Any], name: str) -> None:
        tokenizer = TOKENIZERS[name]()
        ids = [token for seed in range(40) for token in split(name, "".join(PIECES), seed)]
        text = tokenizer.decode(ids)
        chunk = Chunk(0, ids, len(ids), 0, 0, logprobs=[TokenLogprob(token, -1.0) for token in ids])
        rows = json.loads(detokenizers[name].logprobs(chunk, text))
        assert len(rows) == len(ids) > 500
        for row in rows[1:]:
            here = text[row["offset"] :]
            if row["token"].startswith("bytes:"):
                assert row["bytes"][0] in here[0].encode()
                assert bytes(row["bytes"]) in here[: len(row["bytes"])].encode()
            else:
                assert here.startswith(row["token"])

    @examples
    @given(data=st.data(), seed=st.integers(0, 10**6))
    def test_so_it_does_in_noise(self, detokenizers: dict[str, Any], data: st.DataObject, seed: int) -> None:
        tokenizer = TOKENIZERS["byte-level"]()
        ids = data.draw(st.lists(st.integers(1, tokenizer.get_vocab_size() - 1), max_size=20))
        check_stream(detokenizers["byte-level"], tokenizer, tokenizer.encode("hello").ids, ids, seed)


def check_stream(detokenizer: Any, tokenizer: Tokenizer, prompt: list[int], ids: list[int], seed: int) -> None:
    """Run an answer through the engine's release with chunks of random lengths, and look up every token in the text."""
    draw, whole = random.Random(seed), ""
    release = TextRelease(tokenizer.decode, prompt, stops=["STOP"] if seed % 2 else [])
    fed: list[int] = []
    rows: list[dict[str, Any]] = []
    places: list[int] = []

    def send(window: Window, finish_reason: str) -> None:
        nonlocal whole
        entries = [TokenLogprob(token, -1.0) for token in (fed[-window.new :] if window.new else [])]
        chunk = Chunk(
            0, window.ids, window.new, window.cut_start, window.cut_end, finish_reason=finish_reason, logprobs=entries
        )
        text = detokenizer.text(chunk)
        for row in json.loads(detokenizer.logprobs(chunk, text)):
            rows.append(row)
            places.append(len(whole) + row["offset"])
        whole += text

    for token in ids:
        fed.append(token)
        stopped = release.feed(token)
        if stopped:
            break
        if draw.random() < 0.4 and (window := release.take()) is not None:
            send(window, "")
    send(release.flush(), "stop")
    assert [row["id"] for row in rows] == fed
    for row, place in zip(rows, places, strict=True):
        if not row["token"].startswith("bytes:"):
            # A stop string cuts the text short.
            assert whole[place : place + len(row["token"])] == row["token"][: max(0, len(whole) - place)]


class TestPieces:
    @pytest.mark.parametrize(
        ("name", "piece", "text", "data"),
        [
            ("llama-like", "▁fox", " fox", b" fox"),
            ("llama-like", "<0xF0>", "bytes:\\xf0", b"\xf0"),
            ("llama-like", "<0x41>", "A", b"A"),
            ("llama-like", "猫", "猫", "猫".encode()),
            ("llama-like", "<s>", "<s>", b"<s>"),
            ("metaspace", "▁", " ", b" "),
            ("byte-level", "Ġ", " ", b" "),
            ("byte-level", "Ċ", "\n", b"\n"),
            ("byte-level", "<s>", "<s>", b"<s>"),
            ("characters", "é", "é", "é".encode()),
            ("suffixed", "fox</w>", "fox", b"fox"),
        ],
    )
    def test_a_token_alone(self, detokenizers: dict[str, Any], name: str, piece: str, text: str, data: bytes) -> None:
        assert detokenizers[name]._pieces.name_and_bytes(token_id(name, piece)) == (text, data)

    def test_the_byte_alphabet_is_that_of_the_library(self) -> None:
        alphabet = load_module("detokenize", "pieces")._BYTE_OF
        assert sorted(alphabet.values()) == list(range(256))
        decoder = decoders.ByteLevel()
        for character, byte in alphabet.items():
            if byte < 128:
                assert decoder.decode([character]) == chr(byte)

    @given(texts)
    @examples
    def test_the_bytes_of_all_tokens_are_the_texts(self, detokenizers: dict[str, Any], text: str) -> None:
        pieces = detokenizers["byte-level"]._pieces
        ids = TOKENIZERS["byte-level"]().encode(text, add_special_tokens=False).ids
        assert b"".join(pieces.name_and_bytes(token)[1] for token in ids) == text.encode()

    def test_an_id_without_a_token_is_empty(self, detokenizers: dict[str, Any]) -> None:
        assert detokenizers["byte-level"]._pieces.name_and_bytes(10**6) == ("", b"")


class TestNothingFails:
    def test_a_window_without_text_is_an_empty_text_and_a_line_in_the_log(self, model: Any) -> None:
        Logger.errors.clear()
        good = Chunk(1, ids_of("the fox"), 1, 0, 0, usage=Usage(1, 2, 3))
        first, bad, last = outputs(model, request_of(good), request_of(good, window_ids=[-1]), request_of(good))
        assert TEXT_OUTPUT.text(first["text_output"]) == TEXT_OUTPUT.text(last["text_output"]) == "the fox"
        assert TEXT_OUTPUT.text(bad["text_output"]) == ""
        assert LOGPROBS.text(bad["logprobs"]) == ""
        assert bad["usage"].tolist() == [[1, 2, 3]]
        assert Logger.errors

    def test_log_probabilities_that_fail_leave_the_text(self, model: Any) -> None:
        Logger.errors.clear()
        chunk = Chunk(0, ids_of("the fox"), 1, 0, 0, logprobs=[TokenLogprob(-1, -1.0)])
        (found,) = outputs(model, request_of(chunk))
        assert TEXT_OUTPUT.text(found["text_output"]) == "the fox"
        assert LOGPROBS.text(found["logprobs"]) == ""
        assert Logger.errors

    @given(
        st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
        st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 3),
    )
    @examples
    def test_any_numbers_are_answered(self, model: Any, ids: list[int], cut: tuple[int, int, int]) -> None:
        (found,) = outputs(model, request_of(Chunk(0, ids, *cut)))
        assert set(found) == APART

    @given(st.sampled_from(sorted(json.loads(Chunk(0, [], 0, 0, 0).to_json()))), anything)
    @examples
    def test_anything_in_a_chunk_is_answered_or_refused(self, model: Any, field: str, value: object) -> None:
        (answer,) = model.execute([request_of(Chunk(0, [1], 1, 0, 0), **{field: value})])
        if answer.error() is None:
            assert {tensor.name() for tensor in answer.output_tensors()} in (APART, {PIECE.name})
        else:
            assert isinstance(from_wire(answer.error().message()), InvalidRequest)

    @pytest.mark.parametrize(
        "array", [np.array([[b"\xff"]], dtype=object), np.zeros((2, 1), np.int32), CHUNK.pack("{}"), CHUNK.pack("")]
    )
    def test_only_what_no_ensemble_sends_is_refused(self, model: Any, array: Array) -> None:
        good = request_of(Chunk(0, ids_of("the"), 1, 0, 0))
        bad = InferenceRequest({CHUNK.name: array}, WANTED)
        refused, answered = model.execute([bad, good])
        assert isinstance(from_wire(refused.error().message()), InvalidRequest)
        assert answered.error() is None


def test_a_checkpoint_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lm")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Exception, match=r"has no tokenizer\.json"):
        start_model("detokenize", folder)
