"""Access control: the gateway's API keys, and the secret of a Triton's control API. It knows no routes."""
