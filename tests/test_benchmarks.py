"""A benchmark that needs another machine runs here, as little of it as there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_tiny(tmp_path):
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--output", output],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["tiny"]
    assert record["card"]
    rows = {row["name"]: row for row in record["rows"]}
    for name in ("mf.sweep: a chunk, width 100", "mf.measured_boundary, width 100"):
        assert rows[name]["runs_per_second"] > 0
        assert 0 < rows[name]["compile_seconds"] < rows[name]["first_seconds"]
    for index in (1, 2, 3):
        row = rows[f"figure 2, case {index}"]
        # the images may not be here
        assert row.get("cells") == 2 or row["failure"].startswith("DataError"), row
