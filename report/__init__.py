"""What came out: the finished runs of a folder as a table, charts and a page."""
