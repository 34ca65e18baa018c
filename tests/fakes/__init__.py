"""Stand-ins for what only exists inside a running Triton."""
