"""From a step's logits to what callers get: next tokens, text that may leave, chunks, their delivery."""
