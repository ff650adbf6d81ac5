"""The results page: the runs behind it, their figures, and the tables and pictures of them."""
