"""`python -m milora`, the same as `milora` but slower to start: Python imports the package and PEFT first."""

import sys

from milora_cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
