"""Kernels for GPUs in triton-lang (the package `triton`, not the server) and what decides where they are used."""
