"""The reference runner: Hugging Face's modelling code over the paged KV cache; attention is ours (`attention`).

It knows neither requests' parameters nor text.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tritonlm.contract import Checkpoint, CheckpointError

from ..config import EngineConfig
from ..memory import return_freed
from ..monitoring.progress import Progress
from ..sampling.logit_filters import draw
from ..sampling.logprobs import score
from ..sampling.scratch import SCRATCH_BYTES, rows_at_once
from ..scheduling.scheduler import Slice
from . import attention, flat_batch, packed_linear
from .interface import Computed, choose_devices, choose_dtype, engine_memory, weights_on_disk
from .kv_cache import KVCache, LayerShape, cache_size
from .lm_head import Head

_log = logging.getLogger("tritonlm.engine")
_PROBE_TOKENS = 8
# Of each logit while a slice is projected: two copies in float32, as soft-capping makes them. They have half of the
# scratch; the other half is what a heap of such pieces loses between them, and the little that scoring takes.
_LOGIT_BYTES, _PROJECTED_BYTES = 8, SCRATCH_BYTES // 2
_NOT_SERVED = "serve a decoder-only model whose attention follows transformers' attention interface"


class ReferenceRunner:
    """Hugging Face's modelling code over the paged cache."""

    def __init__(self, folder: Path, config: EngineConfig, device: torch.device | None = None) -> None:
        checkpoint = Checkpoint(folder)
        checkpoint.check()
        self.device = device or choose_devices(config.device)[0]
        self.dtype = choose_dtype(config.dtype, checkpoint, self.device)
        self.vocab_size = checkpoint.vocab_size
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        self.memory = engine_memory(config, self.device)
        self.memory.announce(weights_on_disk(checkpoint, self.dtype))
        self._model = load_model(folder, self.dtype, self.device)
        layers, self._head = prepare(self._model, folder)
        self._progress = Progress()
        return_freed()
        # The cache is still to come, or not touched yet.
        left = self.memory.measure()
        size = cache_size(layers, config, checkpoint.context_length, self.dtype, self.device, left)
        self.blocks = self.memory.open_pool(size, grows=self.device.type == "cpu")
        self.context_length = size.context_length
        self._cache = KVCache(layers, self.blocks, config.block_tokens, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, plan: Sequence[Slice]) -> Computed:
        """Compute the plan's slices."""
        return self._compute(flat_batch.build(plan, self._cache.block_tokens, self.dtype, self.device))

    def _compute(self, batch: flat_batch.FlatBatch) -> Computed:
        logits = self._logits(batch, batch.logit_rows)
        hidden = self._head.hidden[0]
        # Where none are wanted nothing is computed, and nothing held.
        wanted = len(batch.hidden_rows) > 0
        hidden = hidden[batch.hidden_rows] if wanted else hidden.new_empty(0, hidden.shape[-1])
        return Computed(logits, hidden, batch=None if self._head.replays else batch)

    def _logits(self, batch: flat_batch.FlatBatch, rows: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=rows,
            paged=attention.Paged(batch, self._cache),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def project(self, computed: Computed, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        step = rows_at_once(_LOGIT_BYTES * self.vocab_size, _PROJECTED_BYTES)
        for start in range(0, len(rows), step):
            yield self._project(computed, torch.tensor(rows[start : start + step], device=self.device))
            self._progress.note()

    def _project(self, computed: Computed, rows: torch.Tensor) -> torch.Tensor:
        if computed.batch is None:
            return self._head(computed.hidden[rows])
        # The whole step once more for each slice: slow, but right, and no larger. Its keys and values are the same
        # again, in the same slots.
        return self._logits(computed.batch, computed.batch.hidden_rows[rows])

    draw = staticmethod(draw)
    score = staticmethod(score)

    def watch(self, progress: Progress) -> None:
        self._progress = progress
        for module in self._model.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    layer.register_forward_hook(lambda *_: progress.note())

    def close(self) -> None:
        self.memory.close()

    def clear(self, blocks: Sequence[int]) -> None:
        self._cache.clear(blocks)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in evaluation mode, or CheckpointError in one sentence."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: PLC0415

    AttentionInterface.register(attention.NAME, attention.paged_attention)
    AttentionMaskInterface.register(attention.NAME, lambda *_, **__: None)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(f"{folder}: {config.model_type} is not a causal language model; {_NOT_SERVED}")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever its loaders raise
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    if device.type == "cpu":
        own(model)
    return model.to(device).eval()


@torch.inference_mode()
def own(model: Any) -> None:
    """Copy the weights out of the file that they are mapped from: a newer one written over it must not change ours."""
    for weight in [*model.parameters(), *model.buffers()]:
        weight.data = weight.data.clone()


@torch.inference_mode()
def prepare(model: Any, folder: Path) -> tuple[list[LayerShape], Head]:
    """Give the model packed weights and our attention; compare a few tokens' logits before and after.

    This is how a family that does not follow the attention interface is found out before it can answer nonsense. And
    the head shows whether it makes the same logits of what the decoder gave.
    """
    from transformers import AttentionInterface  # noqa: PLC0415

    name = type(model).__name__
    ids = torch.arange(_PROBE_TOKENS, device=model.device).unsqueeze(0) % model.get_input_embeddings().num_embeddings
    refusal = f"{folder}: {name} is not supported; {_NOT_SERVED}"
    stand_in = attention.Probe()
    try:
        head = Head(model)
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, use_cache=False).logits
        if packed_linear.is_possible(model.device, model.dtype):
            packed_linear.pack(model)
        AttentionInterface.register(attention.NAME, stand_in)
        model.set_attn_implementation(attention.NAME)
        rows = torch.arange(_PROBE_TOKENS, device=model.device)
        found = model(input_ids=ids, position_ids=rows.unsqueeze(0), use_cache=False, logits_to_keep=rows, paged=True)
        logits = found.logits
        head.check(logits)
    except Exception as error:  # whatever a foreign forward raises, the answer is the same
        raise CheckpointError(f"{refusal} ({type(error).__name__}: {str(error).strip().splitlines()[:1]})") from error
    finally:
        AttentionInterface.register(attention.NAME, attention.paged_attention)
    layers = [stand_in.layers.get(i) for i in range(model.config.get_text_config().num_hidden_layers)]
    tolerance = 1e-3 if logits.dtype == torch.float32 else 0.1
    spread = expected.float().std().clamp(min=1e-6)
    if expected.shape != logits.shape or not layers or None in layers or stand_in.unknown - {"paged"}:
        raise CheckpointError(refusal)
    if not bool(((expected.float() - logits.float()).abs().max() <= tolerance * spread * 10) | expected.isnan().any()):
        raise CheckpointError(refusal)
    if not head.replays:
        _log.warning("%s: log-probabilities of prompts are slow, its logits come from whole forwards only", name)
    return [layer for layer in layers if layer is not None], head
