"""What every program here needs and no other package is about; imports nothing of the project."""
