"""Checkpoints on disk: where they come from, and their tokenizers. It knows no torch."""
