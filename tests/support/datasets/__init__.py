"""Image folders and other datasets for tests."""
