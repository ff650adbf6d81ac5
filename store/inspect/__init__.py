"""Finds caches and describes them, without teacher, dataset or torch."""
