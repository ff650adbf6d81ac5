"""What every program here needs and no other package is about; imports nothing of the project.

Importing it says how long a thread of OpenMP waits for the others before it sleeps. All programs
import it before torch, whose libgomp reads the environment when it is loaded.
"""

import os

# Rounds of a loop, as long as waking a sleeping thread takes. libgomp's 300,000 are milliseconds,
# in which a busy machine cannot run the thread that is waited for; none at all makes each of the
# many short waits of a small network a system call. See docs/development/performance.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
