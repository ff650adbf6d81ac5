"""Find caches and describe them, without teacher, dataset or torch."""
