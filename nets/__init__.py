"""The networks, and where their taps are."""
