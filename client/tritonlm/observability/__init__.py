"""Logs and traces of this package's processes. It does not know what they report."""
