"""tritonlm: serve Hugging Face causal language models from an NVIDIA Triton model repository.

This file knows only the version, so that importing one room (`tritonlm.contract`) imports no other.
"""

__version__ = "0.1.0"
