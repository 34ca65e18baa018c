"""Device names for language models, the same in settings, registry and config.pbtxt."""

from __future__ import annotations

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
# One engine runs on each named device.
PATTERN = r"^(auto|cpu|cuda|(cpu|cuda:\d+)(,(cpu|cuda:\d+))*)$"
ALLOWED = "auto, cpu, cuda, or devices such as cuda:0,cuda:1"
