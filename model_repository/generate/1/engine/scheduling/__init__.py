"""What runs next: admission, the scheduler, KV-cache blocks, draft tokens, the size of a step. It knows no tensors."""
