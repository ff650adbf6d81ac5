"""What (sample, view) looks like: datasets, deterministic draws, augmentation."""
