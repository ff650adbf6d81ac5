"""Every document of a world, and the changes that each of its parts can suffer."""
