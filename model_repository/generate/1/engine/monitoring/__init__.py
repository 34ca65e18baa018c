"""What an engine reports of itself: metrics, state, progress, and the journal of its steps."""
