"""Weights: where their files are, and how they are read without running code."""
