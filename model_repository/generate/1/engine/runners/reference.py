"""The reference runner: Hugging Face's modelling code over the paged KV cache, with the attention of `attention`.

It knows neither the parameters of requests nor text.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tritonlm.contract import Checkpoint, CheckpointError
from tritonlm.contract.load_progress import LoadProgress

from ..adapters.loaded import AdapterWeights
from ..adapters.lora import LoraAdapter
from ..config import QUANTIZED, EngineConfig
from ..memory import trim_heap
from ..monitoring.progress import Progress
from ..sampling.logit_filters import sample_tokens
from ..sampling.logprobs import score
from ..sampling.scratch import SCRATCH_BYTES, rows_at_once
from ..scheduling.scheduler import Slice
from . import attention, dequantized, flat_batch, packed_linear
from .gpu import block_attention, fused_layers, rotary
from .interface import ForwardOutput, choose_devices, choose_dtype, engine_memory, weights_on_disk
from .kv_cache import KVCache, LayerShape, cache_size, stored_dtype
from .lm_head import LMHead
from .loading import import_meta_kernels, in_load_thread, reported_loading, tensor_bytes
from .low_rank import LowRankHooks

_log = logging.getLogger("tritonlm.engine")
# Those of a forward at load: two sequences.
_PROBE_TOKENS, _PROBE_SEQUENCES = 8, 2
# Bytes per logit during a projection: two float32 copies, as soft-capping makes them. They may use half of the scratch
# memory. The other half covers heap fragmentation and the log-probabilities.
_LOGIT_BYTES, _PROJECTED_BYTES = 8, SCRATCH_BYTES // 2
_REMEDY = "serve a decoder-only model whose attention follows transformers' attention interface"

# Makes a model of Hugging Face's in evaluation mode, of this dtype and on this device.
MakeModel = Callable[[torch.dtype, torch.device], Any]


class ReferenceRunner:
    """Runs Hugging Face's modelling code over the paged KV cache."""

    # The most rows of a tile, where attention reads the blocks in place; 0: the blocks are gathered.
    _tile_rows = 0
    # Whether small layers are replaced by those of `gpu`, where that is possible.
    _fuses = False

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        device: torch.device | None = None,
        load_progress: LoadProgress | None = None,
        make_model: MakeModel | None = None,
    ) -> None:
        """`make_model` makes the model in place of the checkpoint's weights: random ones, for a measurement."""
        import_meta_kernels()
        checkpoint = Checkpoint(folder)
        checkpoint.check(weights=make_model is None)
        self.device = device or choose_devices(config.device)[0]
        self.dtype = choose_dtype(config.dtype, checkpoint, self.device)
        self.vocab_size = checkpoint.vocab_size
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        self.memory = engine_memory(config, self.device)
        self.memory.reserve_weights(weights_on_disk(checkpoint, self.dtype))
        self._model = in_load_thread(
            lambda: (
                make_model(self.dtype, self.device)
                if make_model
                else load_model(folder, self.dtype, self.device, load_progress or LoadProgress())
            )
        )
        # Fused MLPs have no layers of their own for the matrices of adapters.
        fuses_mlps = self._fuses and not config.adapters_file
        self._layers, self._head = in_load_thread(
            lambda: prepare(self._model, folder, self._fuses, fuses_mlps=fuses_mlps)
        )
        context = checkpoint.context_length
        settle_longrope(self._model, min(config.max_context_tokens or context, context))
        self._quantize(config)
        self._adapters = LowRankHooks(self._model, self.dtype, self.device) if config.adapters_file else None
        self._progress = Progress()
        trim_heap()
        # Before the KV cache is allocated.
        budget_left = self.memory.measure()
        beside = self._prepare_steps(config, context)
        size = cache_size(self._layers, config, context, self.dtype, self.device, budget_left, beside)
        self.blocks = self.memory.open_pool(size, grows=self.device.type == "cpu")
        self.context_length = size.context_length
        stored = stored_dtype(config, self.dtype)
        self._cache = KVCache(self._layers, self.blocks, config.block_tokens, self.dtype, self.device, stored)

    def _quantize(self, config: EngineConfig) -> None:
        """Quantize the weights as configured: this runner has none but full ones."""
        if config.weights in QUANTIZED:
            raise CheckpointError(f"runner reference does not support weights {config.weights}; set runner to auto")

    def _prepare_steps(self, config: EngineConfig, context: int) -> int:
        """Choose how steps are computed. Return the bytes that they take beside the KV cache, once it is allocated."""
        return 0

    @torch.inference_mode()
    def forward(self, plan: Sequence[Slice]) -> ForwardOutput:
        """Compute the plan's slices."""
        self._select_adapters(plan)
        batch = flat_batch.build(plan, self._cache.block_tokens, self.dtype, self.device, self._tile_rows)
        return self._compute(batch)

    def _select_adapters(self, plan: Sequence[Slice]) -> None:
        if self._adapters:
            self._adapters.select(plan)

    def _compute(self, batch: flat_batch.FlatBatch) -> ForwardOutput:
        logits = self._logits(batch, batch.logit_rows)
        hidden = self._head.hidden[0]
        # Without hidden rows no gather runs, and the states are not kept.
        needed = len(batch.hidden_rows) > 0
        hidden = hidden[batch.hidden_rows] if needed else hidden.new_empty(0, hidden.shape[-1])
        return ForwardOutput(logits, hidden, batch=None if self._head.replays else batch)

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
    def project(self, computed: ForwardOutput, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        step = rows_at_once(_LOGIT_BYTES * self.vocab_size, _PROJECTED_BYTES)
        for start in range(0, len(rows), step):
            yield self._project(computed, torch.tensor(rows[start : start + step], device=self.device))
            self._progress.advance()

    def _project(self, computed: ForwardOutput, rows: torch.Tensor) -> torch.Tensor:
        if computed.batch is None:
            return self._head(computed.hidden[rows])
        # Compute the whole step again for each group of rows: slow but correct, in bounded memory. It writes the same
        # keys and values to the same slots.
        return self._logits(computed.batch, computed.batch.hidden_rows[rows])

    sample_tokens = staticmethod(sample_tokens)
    score = staticmethod(score)

    def load_adapter(self, adapter: LoraAdapter) -> AdapterWeights:
        assert self._adapters, "adapters are loaded where adapters_file is set"
        return self._adapters.load(adapter)

    def watch(self, progress: Progress) -> None:
        self._progress = progress
        for module in self._model.modules():
            if isinstance(module, torch.nn.ModuleList):
                for layer in module:
                    layer.register_forward_hook(lambda *_: progress.advance())

    def close(self) -> None:
        self.memory.close()

    def clear(self, blocks: Sequence[int]) -> None:
        self._cache.clear(blocks)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, progress: LoadProgress) -> Any:
    """Load the model in evaluation mode, or raise CheckpointError."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: PLC0415

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(f"{folder}: {config.model_type} is not a causal language model; {_REMEDY}")
        if Checkpoint(folder).quantized:
            model = dequantized.load(folder, config, dtype, progress)
        else:
            with reported_loading(tensor_bytes(folder), progress):
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
                )
    except CheckpointError:
        raise
    except Exception as error:  # the loaders of transformers may raise anything
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {reason}") from error
    if device.type == "cpu":
        copy_weights(model)
    return model.to(device).eval()


@torch.inference_mode()
def copy_weights(model: Any) -> None:
    """Copy the weights out of the mapped file, so that overwriting the file does not change them."""
    for weight in [*model.parameters(), *model.buffers()]:
        weight.data = weight.data.clone()


def settle_longrope(model: Any, served_context: int) -> None:
    """Give texts of any length the factors of the longest one served, because cached keys keep their rotation.

    Hugging Face's code chooses them anew in each forward, by the longest text in it.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            frequencies = ROPE_INIT_FUNCTIONS["longrope"]
            module.inv_freq, _ = frequencies(module.config, module.inv_freq.device, seq_len=served_context)
            module.rope_type = "default"


@torch.inference_mode()
def prepare(
    model: Any, folder: Path, fuses: bool = False, *, fuses_mlps: bool = False
) -> tuple[list[LayerShape], LMHead]:
    """Pack weights, fuse layers, install the paged attention, and compare the logits of a few tokens before and after.

    The comparison rejects families that do not follow the attention interface, which would generate nonsense: among
    them those whose other layers have a state, which the sequences of a batch would share. It also checks whether the
    LM head reproduces the logits from the hidden states.
    """
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415

    name = type(model).__name__
    rows, tokens = torch.arange(_PROBE_TOKENS, device=model.device), _PROBE_TOKENS // _PROBE_SEQUENCES
    ids, positions = rows.unsqueeze(0) % model.get_input_embeddings().num_embeddings, rows.unsqueeze(0) % tokens
    refusal = f"{folder}: {name} is not supported; {_REMEDY}"
    probe = attention.Probe(tokens)
    AttentionMaskInterface.register(attention.NAME, probe.mask)
    try:
        head = LMHead(model)
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids.view(-1, tokens), use_cache=False).logits
        expected = expected.reshape(1, _PROBE_TOKENS, -1)
        if packed_linear.is_possible(model.device, model.dtype):
            packed_linear.pack(model)
        if fuses and block_attention.is_possible(model.device):
            _log.info("%s: %d layers are fused", name, fused_layers.fuse(model, mlps=fuses_mlps))
            rotary.install(model)
        AttentionInterface.register(attention.NAME, probe)
        model.set_attn_implementation(attention.NAME)
        output = model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows, paged=True)
        logits, options = output.logits, set(probe.unknown)
        # It may compute the layers again.
        head.check(logits)
    except Exception as error:  # a foreign forward may raise anything
        raise CheckpointError(f"{refusal} ({type(error).__name__}: {str(error).strip().splitlines()[:1]})") from error
    finally:
        AttentionInterface.register(attention.NAME, attention.paged_attention)
        AttentionMaskInterface.register(attention.NAME, lambda *_, **__: None)
    text_config = model.config.get_text_config()
    layers = [probe.layers.get(i) for i in range(text_config.num_hidden_layers)]
    context = getattr(text_config, "max_position_embeddings", None) or math.inf
    tolerance = 1e-3 if logits.dtype == torch.float32 else 0.1
    spread = expected.float().std().clamp(min=1e-6)
    # Where a layer's attention does not get the batch, no step could be computed.
    if expected.shape != logits.shape or not layers or None in layers or options != {"paged"}:
        raise CheckpointError(refusal)
    if any(window < context for window in probe.masked_windows):
        raise CheckpointError(f"{folder}: {name} is not supported: only its masks have its sliding window")
    if not bool(((expected.float() - logits.float()).abs().max() <= tolerance * spread * 10) | expected.isnan().any()):
        raise CheckpointError(refusal)
    if not head.replays:
        _log.warning("%s: log-probabilities of prompts are slow, because its logits need whole forwards", name)
    return [layer for layer in layers if layer is not None], head
