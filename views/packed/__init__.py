"""Datasets packed into a single file or into shards."""
