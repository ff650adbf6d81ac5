"""Networks by name, their taps, and the teacher."""
