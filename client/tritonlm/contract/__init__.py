"""What crosses a boundary, written once: tensors, parameters, chunks, errors, and what a checkpoint must hold.

The Triton models, the client and the gateway import this room. It needs the standard library and numpy only,
imports nothing else of the package, and knows nothing of Triton, HTTP or torch.
"""

from .checkpoint import Checkpoint
from .chunk import Chunk, TokenLogprob, Usage
from .errors import (
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
