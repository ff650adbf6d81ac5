"""Validated YAML configs of caches and runs."""
