"""GGUF files as checkpoints: `prepare` writes a checkpoint folder whose weights stay in the file. No torch here."""

from .folder import prepare as prepare
