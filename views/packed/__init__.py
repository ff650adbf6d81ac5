"""Datasets packed into one file, or into shards of files."""
