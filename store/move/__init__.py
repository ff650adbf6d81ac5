"""Copy, convert, export and trim finished caches."""
