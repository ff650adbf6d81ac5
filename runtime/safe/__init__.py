"""Files from untrusted sources: safe reading, writing and locking."""
