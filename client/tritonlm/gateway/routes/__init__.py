"""The gateway's routes, a file per kind. Each parses, calls the client and answers."""
