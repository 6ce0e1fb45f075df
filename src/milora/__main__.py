"""`python -m milora`, the same as `milora`."""

import sys

from milora_cli import main

if __name__ == "__main__":
    sys.exit(main())
