"""Caches of teachers for tests: small ones, forged ones, in folders and in an object store."""
