"""The parts of a command: options, signals, progress, exit status."""
