"""Networks, losses and short runs for tests."""
