"""What an engine reports about itself: metrics, status, progress, and the step journal."""
