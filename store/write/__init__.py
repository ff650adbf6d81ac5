"""Write caches: the writers, and the blocks that are pending."""
