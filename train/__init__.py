"""Stage 2: trains students from a cache of teacher outputs, and teachers that have no weights."""
