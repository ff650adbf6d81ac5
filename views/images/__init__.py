"""Datasets of image files: listed, labeled, checked, decoded."""
