"""The places of a cache besides a folder: an object store, and its local mirror."""
