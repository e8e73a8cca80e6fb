"""`python -m bench` and its other commands as tests run them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_bench(*arguments, module="bench", **variables):
    # One thread: small tensors gain nothing from a second, and wait long for it where tests run side by side.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
