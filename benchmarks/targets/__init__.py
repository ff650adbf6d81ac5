"""Benchmarks: a program per question, each with the targets that its results should meet."""
