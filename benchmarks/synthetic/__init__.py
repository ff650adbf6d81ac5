"""What is measured on: studies, photographs and a store that are made up."""
