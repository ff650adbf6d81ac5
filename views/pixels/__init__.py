"""Batches of views on the training device."""
