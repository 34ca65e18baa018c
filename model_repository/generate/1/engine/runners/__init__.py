"""What computes a step: the interface, and the reference, graphs and native runners behind it."""
