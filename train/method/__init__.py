"""What a method adds to a student: connectors, assistants, pretrained weights, the optimizer."""
