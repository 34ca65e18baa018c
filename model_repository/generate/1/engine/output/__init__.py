"""Turns the logits of a step into output: next tokens, text release, chunks, and their delivery."""
