"""Clips made, read, written and compared."""
