"""Who may call: API keys of the gateway, and the secret of a Triton's control API."""
