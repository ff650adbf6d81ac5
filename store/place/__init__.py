"""Where the bytes of a cache lie besides a folder: an object store, and its local mirror."""
