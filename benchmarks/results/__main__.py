"""python -m benchmarks.results keep|write ...: see `benchmarks.results.page`."""

import sys

from benchmarks.results.page import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
