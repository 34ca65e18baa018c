"""LoRA adapters: low-rank matrices that change what a base LM computes, for the requests that name them."""
