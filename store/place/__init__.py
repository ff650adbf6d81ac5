"""Places of a cache: a folder, an object store, and its local mirror."""
