"""The engine: continuous batching over a paged KV cache. It takes token ids and gives chunks of token ids.

It can be imported and tested without Triton, and knows neither Triton, nor HTTP, nor the rest of the package
beyond `tritonlm.contract`.
"""

import os

# torch's products on a CPU (MKL's) would sum a row's numbers in another order by where the row happens to lie in
# memory, and a sequence have other logits among others than alone.
os.environ.setdefault("MKL_CBWR", "AUTO")
