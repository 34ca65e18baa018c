"""A naive baseline for `bench serving`: FastAPI around `generate()`, one request at a time."""

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


class CompletionRequest(BaseModel):
    prompt: str
    max_tokens: int
    temperature: float


def make_app(folder: Path, dtype: torch.dtype) -> FastAPI:
    app, lock = FastAPI(), threading.Lock()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def events(request: CompletionRequest) -> Iterator[str]:
        inputs = tokenizer(request.prompt, return_tensors="pt")
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        options = {"max_new_tokens": request.max_tokens, "min_new_tokens": request.max_tokens, "do_sample": False}
        with lock:
            thread = threading.Thread(
                target=model.generate, kwargs={**inputs, **options, "streamer": streamer, "pad_token_id": 0}
            )
            thread.start()
            for text in streamer:
                yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
            thread.join()
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': request.max_tokens}})}\n\n"
        yield "data: [DONE]\n\n"

    @app.post("/v1/completions")
    def complete(request: CompletionRequest) -> StreamingResponse:
        return StreamingResponse(events(request), media_type="text/event-stream")

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
