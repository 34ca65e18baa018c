"""How one says where a language model computes: the same words in settings, registry and config.pbtxt."""

from __future__ import annotations

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
# One engine for each device that is named.
PATTERN = r"^(auto|cpu|cuda|(cpu|cuda:\d+)(,(cpu|cuda:\d+))*)$"
ALLOWED = "auto, cpu, cuda, or devices such as cuda:0,cuda:1"
