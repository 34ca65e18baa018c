"""Logits → tokens and log-probabilities. It does not know where logits come from."""
