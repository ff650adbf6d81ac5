"""Datasets of image files: listing, labels, checks, decoding."""
