"""Measurements: each program times its rows in one interleaved run and prints ratios.

Importing `runtime` sets how OpenMP waits, as in every program, before torch is imported.
"""

import teach_once.runtime  # noqa: F401
