"""Who may call, and how much: keys and their scopes, quotas, and the admission queue."""
