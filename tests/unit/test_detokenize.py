"""The model `detokenize`: the text of a chunk, its log-probabilities, and its behaviour on invalid input."""

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

# The output `piece` replaces all other outputs.
OUTPUTS = [spec.name for spec in DETOKENIZE_OUTPUTS]
SEPARATE = {*OUTPUTS} - {PIECE.name}
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
    """Detokenizers of all kinds of tokenizers, without Triton."""
    core, folder = load_module("detokenize", "detokenizer"), tmp_path_factory.mktemp("checkpoints")
    return {
        name: core.Detokenizer(Checkpoint(write_checkpoint(folder / name, make()))) for name, make in TOKENIZERS.items()
    }


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def id_of(token: str) -> int:
    index = TOKENIZER.token_to_id(token)
    assert index is not None
    return index


def byte_ids_of(text: str) -> list[int]:
    """The text as one token per byte."""
    alphabet = load_module("detokenize", "token_bytes")._BYTE_OF
    spelled = {byte: character for character, byte in alphabet.items()}
    return [id_of(spelled[byte]) for byte in text.encode()]


def request_of(chunk: Chunk, outputs: Sequence[str] = OUTPUTS, **changes: object) -> InferenceRequest:
    text = json.dumps(json.loads(chunk.to_json()) | changes)
    return InferenceRequest({CHUNK.name: CHUNK.pack(text)}, list(outputs))


def outputs(model: Any, *requests: InferenceRequest) -> list[dict[str, Array]]:
    responses = model.execute(list(requests))
    assert all(response.error() is None for response in responses)
    return [{tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()} for response in responses]


def text_of(model: Any, chunk: Chunk) -> str:
    (values,) = outputs(model, request_of(chunk))
    return TEXT_OUTPUT.text(values[TEXT_OUTPUT.name])


def rows_of(model: Any, chunk: Chunk) -> list[dict[str, Any]]:
    (values,) = outputs(model, request_of(chunk))
    rows: list[dict[str, Any]] = json.loads(LOGPROBS.text(values[LOGPROBS.name]))
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

    def test_all_other_fields_are_passed_on(self, model: Any) -> None:
        chunk = Chunk(3, ids_of("the"), 1, 0, 0, True, "stop", Usage(4, 5, 2), [7, 8], -(2**63))
        (values,) = outputs(model, request_of(chunk))
        assert set(values) == SEPARATE
        assert {name: values[name].tolist() for name in ("chunk_index", "usage", "token_ids", "seed")} == {
            "chunk_index": [[3]],
            "usage": [[4, 5, 2]],
            "token_ids": [[7, 8]],
            "seed": [[-(2**63)]],
        }
        assert FINISH_REASON.text(values["finish_reason"]) == "stop"
        assert {name: array.dtype.name for name, array in values.items()} == {
            spec.name: NUMPY_TYPE[spec.dtype] for spec in DETOKENIZE_OUTPUTS if spec.name in SEPARATE
        }

    def test_only_requested_outputs_are_made(self, model: Any) -> None:
        (values,) = outputs(model, request_of(Chunk(0, ids_of("the"), 1, 0, 0), ["seed", "text_output"]))
        assert set(values) == {"seed", "text_output"}

    def test_a_piece_holds_all_other_outputs(self, model: Any) -> None:
        entry = TokenLogprob(id_of(END), -0.5)
        chunk = Chunk(3, ids_of("the 猫\n"), 1, 0, 0, True, "stop", Usage(4, 5, 2), [7, 8], -(2**63), [entry])
        separate, together = outputs(model, request_of(chunk), request_of(replace(chunk, as_piece=True)))
        assert set(together) == {PIECE.name}
        values = json.loads(PIECE.text(together[PIECE.name]))
        assert values.keys() == separate.keys()
        for spec in DETOKENIZE_OUTPUTS:
            if spec.name in SEPARATE:
                assert spec.pack(values[spec.name]).tolist() == separate[spec.name].tolist(), spec.name

    def test_a_piece_names_the_stop_string_that_ended_the_text(self, model: Any) -> None:
        (piece,) = outputs(model, request_of(Chunk(0, ids_of("the"), 1, 0, 0, as_piece=True, stop="fox")))
        assert json.loads(PIECE.text(piece[PIECE.name]))["stop"] == "fox"


class TestLogprobs:
    def test_without_a_request_there_are_none(self, model: Any) -> None:
        (values,) = outputs(model, request_of(Chunk(0, ids_of("the"), 1, 0, 0)))
        assert LOGPROBS.text(values[LOGPROBS.name]) == ""

    def test_an_entry_has_all_fields_of_openai(self, model: Any) -> None:
        the, fox = ids_of("the"), ids_of(" fox")
        assert len(the) == len(fox) == 1, "the test needs whole words as tokens"
        chunk = Chunk(0, [*the, *fox], 1, 3, 0, logprobs=[TokenLogprob(fox[0], -0.5, ((fox[0], -0.5), (the[0], -2.0)))])
        named = {"id": fox[0], "token": " fox", "logprob": -0.5, "bytes": list(b" fox")}
        other = {"id": the[0], "token": "the", "logprob": -2.0, "bytes": list(b"the")}
        assert rows_of(model, chunk) == [{**named, "top": [named, other], "offset": 0}]

    def test_the_first_prompt_token_has_no_logprob(self, model: Any) -> None:
        ids = ids_of("the fox")
        chunk = Chunk(
            0, ids, len(ids), 0, 0, logprobs=[TokenLogprob(i, None if n == 0 else -1.0) for n, i in enumerate(ids)]
        )
        assert [(row["token"], row["logprob"], row["offset"]) for row in rows_of(model, chunk)] == [
            ("the", None, 0),
            (" fox", -1.0, 3),
        ]

    def test_tokens_without_text_are_named_by_their_bytes(self, model: Any) -> None:
        ids = byte_ids_of("a👍")
        chunk = Chunk(0, ids, 5, 0, 0, logprobs=[TokenLogprob(token, -1.0) for token in ids])
        assert [(row["token"], row["bytes"], row["offset"]) for row in rows_of(model, chunk)] == [
            ("a", [0x61], 0),
            ("bytes:\\xf0", [0xF0], 1),
            ("bytes:\\x9f", [0x9F], 1),
            ("bytes:\\x91", [0x91], 1),
            ("bytes:\\x8d", [0x8D], 1),
        ]

    def test_an_unfinished_character_has_its_future_offset(self, model: Any) -> None:
        ids = byte_ids_of("a👍")[:3]
        chunk = Chunk(0, ids, 3, 0, 1, logprobs=[TokenLogprob(token, -1.0) for token in ids])
        assert text_of(model, chunk) == "a"
        assert [row["offset"] for row in rows_of(model, chunk)] == [0, 1, 1]

    def test_text_of_an_earlier_chunk_has_negative_offsets(self, model: Any) -> None:
        # An earlier chunk holds " qu".
        ids = [*ids_of("the"), *byte_ids_of(" quick")]
        chunk = Chunk(1, ids, 6, 6, 0, logprobs=[TokenLogprob(token, -1.0) for token in ids[1:]])
        assert text_of(model, chunk) == "ick"
        assert [row["offset"] for row in rows_of(model, chunk)] == [-3, -2, -1, 0, 1, 2]

    def test_held_back_text_has_offsets_beyond_the_end_except_in_the_last_chunk(self, model: Any) -> None:
        ids = byte_ids_of("fox###")
        entries = [TokenLogprob(token, -1.0) for token in ids]
        held, last = (Chunk(0, ids, 6, 0, 3, finish_reason=reason, logprobs=entries) for reason in ("", "stop"))
        assert [row["offset"] for row in rows_of(model, held)] == [0, 1, 2, 3, 4, 5]
        assert [row["offset"] for row in rows_of(model, last)] == [0, 1, 2, 3, 3, 3]

    def test_an_end_token_beyond_the_window_has_the_offset_of_the_end(self, model: Any) -> None:
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
    def test_each_offset_in_a_stream_points_at_its_token(
        self, detokenizers: dict[str, Any], name: str, text: str, seed: int
    ) -> None:
        prompt = TOKENIZERS[name]().encode("hello", add_special_tokens=False).ids or [token_id(name, "a")]
        check_stream(detokenizers[name], TOKENIZERS[name](), prompt, split(name, text, seed), seed)

    # Without the tokenizer whose vocabulary is too small.
    @pytest.mark.parametrize("name", sorted(set(TOKENIZERS) - {"suffixed"}))
    def test_each_offset_in_a_long_prompt_points_at_its_token(self, detokenizers: dict[str, Any], name: str) -> None:
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
    def test_each_offset_in_random_ids_points_at_its_token(
        self, detokenizers: dict[str, Any], data: st.DataObject, seed: int
    ) -> None:
        tokenizer = TOKENIZERS["byte-level"]()
        ids = data.draw(st.lists(st.integers(1, tokenizer.get_vocab_size() - 1), max_size=20))
        check_stream(detokenizers["byte-level"], tokenizer, tokenizer.encode("hello").ids, ids, seed)


def check_stream(detokenizer: Any, tokenizer: Tokenizer, prompt: list[int], ids: list[int], seed: int) -> None:
    """Pass ids through the engine's release with chunks of random lengths, and look up every token in the text."""
    rng, whole = random.Random(seed), ""
    release = TextRelease(tokenizer.decode, prompt, stops=["STOP"] if seed % 2 else [])
    fed: list[int] = []
    rows: list[dict[str, Any]] = []
    positions: list[int] = []

    def send(window: Window, finish_reason: str) -> None:
        nonlocal whole
        entries = [TokenLogprob(token, -1.0) for token in (fed[-window.new :] if window.new else [])]
        chunk = Chunk(
            0, window.ids, window.new, window.cut_start, window.cut_end, finish_reason=finish_reason, logprobs=entries
        )
        text = detokenizer.text(chunk)
        for row in json.loads(detokenizer.logprobs(chunk, text)):
            rows.append(row)
            positions.append(len(whole) + row["offset"])
        whole += text

    for token in ids:
        fed.append(token)
        stopped = release.feed(token)
        if stopped:
            break
        if rng.random() < 0.4 and (window := release.take()) is not None:
            send(window, "")
    send(release.flush(), "stop")
    assert [row["id"] for row in rows] == fed
    for row, position in zip(rows, positions, strict=True):
        if not row["token"].startswith("bytes:"):
            # A stop string cuts the text off.
            assert whole[position : position + len(row["token"])] == row["token"][: max(0, len(whole) - position)]


class TestTokenBytes:
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
    def test_a_single_token(self, detokenizers: dict[str, Any], name: str, piece: str, text: str, data: bytes) -> None:
        assert detokenizers[name]._token_bytes.name_and_bytes(token_id(name, piece)) == (text, data)

    def test_the_byte_alphabet_equals_that_of_the_library(self) -> None:
        alphabet = load_module("detokenize", "token_bytes")._BYTE_OF
        assert sorted(alphabet.values()) == list(range(256))
        decoder = decoders.ByteLevel()
        for character, byte in alphabet.items():
            if byte < 128:
                assert decoder.decode([character]) == chr(byte)

    @given(texts)
    @examples
    def test_the_bytes_of_all_tokens_are_those_of_the_text(self, detokenizers: dict[str, Any], text: str) -> None:
        token_bytes = detokenizers["byte-level"]._token_bytes
        ids = TOKENIZERS["byte-level"]().encode(text, add_special_tokens=False).ids
        assert b"".join(token_bytes.name_and_bytes(token)[1] for token in ids) == text.encode()

    def test_an_id_without_a_token_is_empty(self, detokenizers: dict[str, Any]) -> None:
        assert detokenizers["byte-level"]._token_bytes.name_and_bytes(10**6) == ("", b"")


class TestFailures:
    def test_an_undecodable_window_is_an_empty_text_and_a_log_line(self, model: Any) -> None:
        Logger.errors.clear()
        good = Chunk(1, ids_of("the fox"), 1, 0, 0, usage=Usage(1, 2, 3))
        first, bad, last = outputs(model, request_of(good), request_of(good, window_ids=[-1]), request_of(good))
        assert TEXT_OUTPUT.text(first["text_output"]) == TEXT_OUTPUT.text(last["text_output"]) == "the fox"
        assert TEXT_OUTPUT.text(bad["text_output"]) == ""
        assert LOGPROBS.text(bad["logprobs"]) == ""
        assert bad["usage"].tolist() == [[1, 2, 3]]
        assert Logger.errors

    def test_failed_log_probabilities_do_not_affect_the_text(self, model: Any) -> None:
        Logger.errors.clear()
        chunk = Chunk(0, ids_of("the fox"), 1, 0, 0, logprobs=[TokenLogprob(-1, -1.0)])
        (values,) = outputs(model, request_of(chunk))
        assert TEXT_OUTPUT.text(values["text_output"]) == "the fox"
        assert LOGPROBS.text(values["logprobs"]) == ""
        assert Logger.errors

    @given(
        st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
        st.tuples(*[st.integers(-(2**31), 2**31 - 1)] * 3),
    )
    @examples
    def test_any_numbers_give_all_outputs(self, model: Any, ids: list[int], cut: tuple[int, int, int]) -> None:
        (values,) = outputs(model, request_of(Chunk(0, ids, *cut)))
        assert set(values) == SEPARATE

    @given(st.sampled_from(sorted(json.loads(Chunk(0, [], 0, 0, 0).to_json()))), anything)
    @examples
    def test_any_value_in_a_chunk_gives_outputs_or_an_error(self, model: Any, field: str, value: object) -> None:
        (response,) = model.execute([request_of(Chunk(0, [1], 1, 0, 0), **{field: value})])
        if response.error() is None:
            assert {tensor.name() for tensor in response.output_tensors()} in (SEPARATE, {PIECE.name})
        else:
            assert isinstance(from_wire(response.error().message()), InvalidRequest)

    @pytest.mark.parametrize(
        "array", [np.array([[b"\xff"]], dtype=object), np.zeros((2, 1), np.int32), CHUNK.pack("{}"), CHUNK.pack("")]
    )
    def test_only_inputs_that_no_ensemble_sends_are_refused(self, model: Any, array: Array) -> None:
        good = request_of(Chunk(0, ids_of("the"), 1, 0, 0))
        bad = InferenceRequest({CHUNK.name: array}, OUTPUTS)
        refused, accepted = model.execute([bad, good])
        assert isinstance(from_wire(refused.error().message()), InvalidRequest)
        assert accepted.error() is None


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lm")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(Exception, match=r"has no tokenizer\.json"):
        start_model("detokenize", folder)
