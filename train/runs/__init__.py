"""A study and its runs: teachers, caches, identity, folders, finished results."""
