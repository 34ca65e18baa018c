"""Turns logits into tokens and log-probabilities. It does not know the source of the logits."""
