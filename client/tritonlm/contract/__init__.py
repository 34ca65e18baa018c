"""The interfaces between processes: tensors, parameters, chunks, errors, and the required content of a checkpoint.

The Triton models, the client and the gateway import this package. It needs the standard library and numpy only,
imports nothing else of tritonlm, and knows nothing of Triton, HTTP or torch.
"""

from .checkpoint import Checkpoint
from .chunk import Chunk, TokenLogprob, Usage
from .errors import (
    AdapterNotFound,
    Broken,
    Cancelled,
    CheckpointError,
    ContextLengthExceeded,
    Draining,
    EngineFailure,
    InsufficientScope,
    InvalidKey,
    InvalidRequest,
    ModelNotFound,
    NoRoom,
    NotLoaded,
    NotOffered,
    QueueFull,
    QueueTimeout,
    RateLimited,
    RequestFailedRepeatedly,
    TimedOut,
    TritonLMError,
    Unavailable,
)
from .parameters import SamplingParameters
from .request import GenerationRequest

__all__ = [
    "AdapterNotFound",
    "Broken",
    "Cancelled",
    "Checkpoint",
    "CheckpointError",
    "Chunk",
    "ContextLengthExceeded",
    "Draining",
    "EngineFailure",
    "GenerationRequest",
    "InsufficientScope",
    "InvalidKey",
    "InvalidRequest",
    "ModelNotFound",
    "NoRoom",
    "NotLoaded",
    "NotOffered",
    "QueueFull",
    "QueueTimeout",
    "RateLimited",
    "RequestFailedRepeatedly",
    "SamplingParameters",
    "TimedOut",
    "TokenLogprob",
    "TritonLMError",
    "Unavailable",
    "Usage",
]
