"""Draws to integers, and (image, integers) to a view."""
