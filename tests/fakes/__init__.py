"""Fakes of what exists only in a running Triton."""
