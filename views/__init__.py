"""Views of samples: datasets, deterministic draws, augmentation."""
