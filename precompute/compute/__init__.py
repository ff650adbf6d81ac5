"""The teacher over the views: blocks of records, computed and committed."""
