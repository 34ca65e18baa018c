"""Structured outputs: which tokens may come next, as a function of a grammar and the tokens so far.

It knows llguidance and the tokenizer. It knows neither torch, models, Triton nor HTTP.
"""
