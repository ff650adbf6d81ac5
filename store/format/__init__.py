"""The files of a cache: manifest, journal, metadata, and the coding of values."""
