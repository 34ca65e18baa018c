"""llama.cpp's own converter, for a checkpoint whose tokenizer was trained here: `to_gguf.py LLAMA_CPP FOLDER OPTIONS`.

The converter knows tokenizers by a fingerprint, and ours is in no list: it splits text as GPT-2's does. It also wants
the length of the context under a name that newer configurations of GPT-2 no longer have.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

root = Path(sys.argv.pop(1))
sys.path[:0] = [str(root), str(root / "gguf-py")]

from conversion import base  # noqa: E402

load = base.ModelBase.load_hparams
base.ModelBase.load_hparams = staticmethod(lambda *given, **named: {"n_ctx": 1024, **load(*given, **named)})
base.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
runpy.run_path(str(root / "convert_hf_to_gguf.py"), run_name="__main__")
