"""Trains causal language models, from scratch or from a checkpoint, into checkpoints that can be served.

transformers' Trainer runs the steps. This package knows files and tensors. It does not know serving, HTTP or Triton.
"""
