"""The command as a process: the script ``crossflow``, ``python -m crossflow``, ``accelerate launch -m crossflow``."""

import gc
import sys
from typing import NoReturn

from crossflow.cli import main


def run() -> NoReturn:
    """Runs the command line and exits with its status.

    Importing torch makes half a million objects, none of them garbage. Looking through them takes 0.2 s while they are
    made and 0.4 s when Python exits; with a higher threshold, and frozen at the end, they are left alone. Not where
    triton was imported (by torch's compiler), which reports every object that exists after the exit.
    """
    gc.set_threshold(50_000, *gc.get_threshold()[1:])
    status = main()
    if "triton" not in sys.modules:
        gc.freeze()
    sys.exit(status)


if __name__ == "__main__":
    run()
