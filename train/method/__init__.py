"""Additions of a method to a student: connectors, assistants, pretrained weights, optimizer."""
