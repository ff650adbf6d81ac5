"""Copies, converts, exports and trims finished caches."""
