"""What a cache and a run are, as validated YAML."""
