"""Trains causal language models: from scratch or further, on generated or given data, into checkpoints to be served.

transformers' Trainer does the steps. It knows files and tensors; serving, HTTP and Triton are other rooms'.
"""
