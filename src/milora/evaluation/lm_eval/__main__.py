"""`python -m milora.evaluation.lm_eval`: the same as `milora lm-eval`."""

import sys

from milora.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["lm-eval", *sys.argv[1:]]))
