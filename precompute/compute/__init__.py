"""The teacher pass: compute blocks of records and commit them."""
