"""Searches for files and moments that violate a guarantee, longer than tests."""
