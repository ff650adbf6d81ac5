"""Studies and runs: teachers, caches, identities, folders, finished results."""
