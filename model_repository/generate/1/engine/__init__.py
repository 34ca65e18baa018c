"""The engine: continuous batching over a paged KV cache. It takes token ids and gives chunks of token ids.

It can be imported and tested without Triton, and knows neither Triton, nor HTTP, nor the rest of the package
beyond `tritonlm.contract`.
"""
