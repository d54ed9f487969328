"""Runs the seven benchmarks of speed one after the other; exit status 1 when any claim is false.

Run: ``python run_all.py`` (about 50 minutes on 2 cores).
"""

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "fisher_lambda_max.py",
    "spectral_density.py",
    "theory_grid.py",
    "theory_on_data.py",
    "sweep_speed.py",
    "phase_speed.py",
    "tune_speed.py",
)


def main() -> int:
    """Each script in a process of its own; all run, even when one fails."""
    folder = Path(__file__).parent
    codes = [subprocess.run([sys.executable, folder / script]).returncode for script in SCRIPTS]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
