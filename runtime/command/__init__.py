"""What a command of the project is made of: options, signals, progress, exit status."""
