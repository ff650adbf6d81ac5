"""Measurements: each program takes its rows side by side in one run and prints ratios."""
