"""Tests with a real Triton. The folder is not named `triton`: torch would import it as the compiler of that name."""
