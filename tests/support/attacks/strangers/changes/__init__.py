"""Every document of a world, and the possible changes of each part."""
