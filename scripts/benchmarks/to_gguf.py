"""llama.cpp's own converter, for the checkpoints of the benchmarks: `to_gguf.py LLAMA_CPP FOLDER OPTIONS`.

The converter recognizes byte-level tokenizers by a fingerprint, and those made here are not in its list; they
pre-tokenize as GPT-2's does. It needs the context length as `n_ctx`, which newer GPT-2 configurations do not have. For
Gemma without a SentencePiece file it would write a byte-level vocabulary; its tokenizer.json has the same pieces, by
descending score.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

root = Path(sys.argv.pop(1))
sys.path[:0] = [str(root), str(root / "gguf-py")]

import gguf  # noqa: E402
from conversion import base  # noqa: E402

load = base.ModelBase.load_hparams
fingerprint, byte_level = base.TextModel.get_vocab_base_pre, base.TextModel._set_vocab_gpt2
sentence_piece = base.TextModel._create_vocab_sentencepiece


def pre_tokenizer(model: Any, tokenizer: Any) -> str:
    try:
        return str(fingerprint(model, tokenizer))
    except NotImplementedError:
        return "gpt-2"


def set_vocabulary(model: Any) -> None:
    tokenizer = json.loads((model.dir_model / "tokenizer.json").read_text(encoding="utf-8"))
    if not tokenizer["model"].get("byte_fallback"):
        return byte_level(model)
    model._set_vocab_llama_hf()
    return model.gguf_writer.add_add_space_prefix(False)


def pieces(model: Any) -> Any:
    """Without the file the converter tries other tokenizers, but only after it has found the package."""
    if not (model.dir_model / "tokenizer.model").is_file():
        raise FileNotFoundError("tokenizer.model")
    return sentence_piece(model)


base.ModelBase.load_hparams = staticmethod(lambda *args, **kwargs: {"n_ctx": 1024, **load(*args, **kwargs)})
base.TextModel.get_vocab_base_pre = pre_tokenizer
base.TextModel._set_vocab_gpt2 = set_vocabulary
base.TextModel._create_vocab_sentencepiece = pieces
gguf.LlamaHfVocab.get_token_score = lambda _vocabulary, number: -float(number)
runpy.run_path(str(root / "convert_hf_to_gguf.py"), run_name="__main__")
