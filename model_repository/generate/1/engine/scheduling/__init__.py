"""Decides what runs next: admission, scheduler, KV-cache blocks, draft tokens, step size. It knows no tensors."""
