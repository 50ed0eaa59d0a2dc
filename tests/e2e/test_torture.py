"""A few of the kills of `make torture`: SIGKILL at random moments and inside of writes, and every resume ends where nobody was killed.

A subprocess, because runs are forked from a process that has never trained, and this one has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_runs_end_as_if_nothing_had_been(tmp_path, tiny_lm):
    folder = tmp_path / "torture"
    command = [sys.executable, str(ROOT / "scripts" / "torture.py"), "--kills", "4", "--processes", "1,2", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    results = json.loads((folder / "summary.json").read_text())["results"]
    assert [r["processes"] for r in results] == [1, 2]
    for result in results:
        assert result["kills"] == 4 and result["resumes"] >= 1 and result["failures"] == []
        assert "failure" not in result["kinds"]
