"""llama.cpp's own converter, for a checkpoint whose tokenizer was trained here: `to_gguf.py LLAMA_CPP FOLDER OPTIONS`.

The converter recognizes tokenizers by a fingerprint, and this one is not in its list; it pre-tokenizes as GPT-2's does.
The converter also needs the context length as `n_ctx`, which newer GPT-2 configurations do not have.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

root = Path(sys.argv.pop(1))
sys.path[:0] = [str(root), str(root / "gguf-py")]

from conversion import base  # noqa: E402

load = base.ModelBase.load_hparams
base.ModelBase.load_hparams = staticmethod(lambda *args, **kwargs: {"n_ctx": 1024, **load(*args, **kwargs)})
base.TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
runpy.run_path(str(root / "convert_hf_to_gguf.py"), run_name="__main__")
