"""Files that somebody else may have made or changed: read, written and locked with care."""
