"""What one writes in an afternoon: FastAPI around `generate()`, one request at a time. A rival for `bench serving`."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


class Asked(BaseModel):
    prompt: str
    max_tokens: int
    temperature: float


def make_app(folder: Path, dtype: torch.dtype) -> FastAPI:
    app, alone = FastAPI(), threading.Lock()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def events(asked: Asked) -> Iterator[str]:
        inputs = tokenizer(asked.prompt, return_tensors="pt")
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        options = {"max_new_tokens": asked.max_tokens, "min_new_tokens": asked.max_tokens, "do_sample": False}
        with alone:
            thread = threading.Thread(
                target=model.generate, kwargs={**inputs, **options, "streamer": streamer, "pad_token_id": 0}
            )
            thread.start()
            for text in streamer:
                yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
            thread.join()
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': asked.max_tokens}})}\n\n"
        yield "data: [DONE]\n\n"

    @app.post("/v1/completions")
    def complete(asked: Asked) -> StreamingResponse:
        return StreamingResponse(events(asked), media_type="text/event-stream")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    app = make_app(options.folder, getattr(torch, options.dtype))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
