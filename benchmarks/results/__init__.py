"""The results page: its runs, their metrics, tables and pictures."""
