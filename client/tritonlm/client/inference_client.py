"""A client with the interface of an older inference server, over HTTP: `generate` returns dictionaries.

It exists for programs written for that server; new programs use `tritonlm.Client`. It needs the gateway's URL only.
"""

from __future__ import annotations

from typing import Any

import httpx

from tritonlm.contract import TimedOut, TritonLMError, Unavailable
from tritonlm.contract.errors import from_code


class InferenceClient:
    """Use it as a context manager, or call `close`."""

    def __init__(self, base_url: str = "http://127.0.0.1:8080", timeout: float = 600.0) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout)

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(
        self,
        prompt: str,
        max_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = None,
        stop_on_newline: bool = False,
    ) -> dict[str, Any]:
        """{prompt, generated_text (the prompt and its continuation), tokens_generated, model}."""
        payload = {
            "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k,
            "stop_on_newline": stop_on_newline,
        }  # fmt: skip
        return self._request("POST", "/generate", payload)

    def health(self) -> dict[str, Any]:
        return self._request("GET", "/health")

    def info(self) -> dict[str, Any]:
        """{checkpoint, step, val_loss, model_layers, model_dim, vocab_size}."""
        return self._request("GET", "/info")

    def _request(self, method: str, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, json=payload)
        except httpx.TimeoutException:
            raise TimedOut(f"{self._http.base_url} does not answer in time") from None
        except httpx.TransportError:
            raise Unavailable(f"no gateway answers at {self._http.base_url}") from None
        try:
            body: Any = response.json()
        except ValueError:
            raise TritonLMError(
                f"{self._http.base_url} did not return JSON (HTTP status {response.status_code})"
            ) from None
        if response.is_error and "error" in body:
            error = body["error"]
            raise from_code(error.get("code"), str(error.get("message")), error.get("param"))
        result: dict[str, Any] = body
        return result
