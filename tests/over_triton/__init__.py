"""The ring over a real Triton. The folder is not named `triton`: torch would take it for the compiler of that name."""
