"""Checkpoints on disk: fetching them from the Hugging Face Hub, and loading their tokenizers. No torch here."""
