"""The report of a folder's finished runs: a table, charts and a page."""
