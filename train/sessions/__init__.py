"""Whole runs from their start to their end: a student, a teacher, several together, a trial."""
