"""Searches for files and moments that break a promise: more cases than a test has time for."""
