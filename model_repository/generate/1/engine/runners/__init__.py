"""The model runners, which compute a step: their interface, and the reference, graph and native runners."""
