"""Complete runs: a student, a teacher, several students together, a trial."""
