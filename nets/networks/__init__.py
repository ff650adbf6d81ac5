"""Networks by name: how they are built and how their outputs are laid out."""
