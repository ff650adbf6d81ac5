"""Weights files: where they are, and how they are read without running code."""
