"""Measure the library beside plain Python, and beside its peers."""
