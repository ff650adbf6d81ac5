"""Services that every program needs: commands, files, this machine. Imports nothing of the project.

Importing this package sets how long an OpenMP thread spins before it sleeps. Every program imports
it before torch, whose libgomp reads the environment when it is loaded.
"""

import os

# Iterations of a spin loop, about as long as waking a sleeping thread takes. libgomp's default of
# 300,000 takes milliseconds, in which a busy machine cannot run the awaited thread. With 0, each of
# the many short waits of a small network is a system call. See docs/development/performance.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
