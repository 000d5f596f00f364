"""``python -m crossflow`` (and ``accelerate launch -m crossflow``) is the command ``crossflow``."""

import sys

from crossflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
