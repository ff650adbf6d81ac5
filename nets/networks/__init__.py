"""The networks by name, how they are built, and how they lay out what they compute."""
