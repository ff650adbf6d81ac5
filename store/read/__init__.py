"""Opens a cache wherever it lies, and reads verified records from it."""
