"""What a cache is on disk: manifest, journal, metadata, and the coding of values."""
