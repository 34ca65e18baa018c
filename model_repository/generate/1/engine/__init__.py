"""The engine: continuous batching over a paged KV cache. It takes token ids and returns chunks of token ids.

It can be imported and tested without Triton. It knows neither Triton nor HTTP, and of the package `tritonlm` only
`tritonlm.contract`.
"""

import os

# Without this, MKL's matmul on a CPU chooses the order of summation by the memory alignment of a row. Then a sequence
# has other logits in a batch than alone.
os.environ.setdefault("MKL_CBWR", "AUTO")
