"""Open a cache at any place, and read verified records from it."""
