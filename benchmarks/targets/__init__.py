"""What is measured: a program per question, each with the targets that its figures should meet."""
