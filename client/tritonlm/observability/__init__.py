"""Logs and traces of this package's processes."""
