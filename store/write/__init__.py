"""Create, resume and grow a cache, and commit its blocks."""
