"""Shared parts of tests: small real objects, and ways to inspect them."""
