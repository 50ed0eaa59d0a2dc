"""scripts/bench_rollout*.py: both sides draw and learn the same, and what is made of their times. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # they import one another
bench, report, rollout, worker = (importlib.import_module(f"bench{part}") for part in ("", "_report", "_rollout", "_rollout_worker"))
sys.path.pop(0)
CELL = rollout.CELLS["cpu"][0]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """What both sides compute of the tiny form, one after the other in this process."""
    root, cell = tmp_path_factory.mktemp("bench"), rollout.tiny(CELL)
    rollout.write_captions(root / "data" / "rows.jsonl", cell.prompts * cell.rounds)
    job = {**asdict(cell), "work": str(root), "model": str(root / "model"), "rows": str(root / "data" / "rows.jsonl"), "cuda": False,
           "threads": 1, "precision": "fp32", "out": str(root / "made.json")}
    worker.make(job)
    found = {}
    for side in rollout.SIDES:
        AcceleratorState._reset_state(True)
        clock = worker.Rollouts(False, time.time())
        getattr(worker, side)(job, clock)
        found[side] = clock.result() | {"peak_bytes": 1}
    return found


def test_both_sides_draw_and_learn_the_same(sides):
    gaps = rollout.check_equal("tiny", sides["prefopt"], sides["baseline"], "fp32", first=2)
    assert gaps.keys() == rollout.COMPARED.keys()
    for found in sides.values():
        first, second = found["steps"][:2]
        assert first["kl"] < 1e-9 and first["ratio"] < 1e-5, "the first step is on what the policy has just drawn"
        assert second["kl"] > 1e-5 and second["ratio"] > 1e-4, "and the second on what it would no longer draw"
        assert len(found["rewards"]) == len(found["drawing"]) == 2 and len(found["steps"]) == len(found["training"]) == 4
        assert len({reward for own in found["rewards"] for reward in own}) == 8, "no picture is like another"
        assert rollout.measured(found, rollout.tiny(CELL))["pictures_per_second"] > 0
    assert sides["prefopt"]["reference"] == "adapter off"


@pytest.mark.parametrize("what", rollout.COMPARED)
def test_sides_that_do_something_else_stop_the_benchmark(what, sides):
    other = json.loads(json.dumps(sides["baseline"]))
    if what == "reward":
        other["rewards"][1][0] += 1e-3
    else:
        other["steps"][1][what] *= 1.1
    with pytest.raises(SystemExit, match=f"{what} of .* 2 is .*: the sides do not train the same"):
        rollout.check_equal("tiny", sides["prefopt"], other, "fp32", first=2)


# ---- what is made of the times -------------------------------------------------------------------------


def out(drawing, step, peak):
    """Three rounds of two steps each; the first of everything took ten times as long."""
    drawn, trained = [[0, 10 * drawing], [0, drawing], [0, drawing]], [[0, 10 * step]] * 2 + [[0, step]] * 4
    steps = [{"loss": 0.0, "logp": -1.1, "ratio": 0.0, "kl": 0.0}] * 6
    return {"drawing": drawn, "training": trained, "decoding": 6.0, "rewards": [[0.5] * 8] * 3, "steps": steps, "peak_bytes": peak,
            "reference": "adapter off"}


class Pretended(rollout.Bench):
    """prefopt draws for 4 s and steps for 2 s, the plain loop for 4 s and 3 s."""

    def job(self, kind, cell, folder, **more):
        folder.mkdir(parents=True)
        self.__dict__.setdefault("turns", []).append(kind)
        return out(4.0, 2.0, 3e9) if kind == "prefopt" else out(4.0, 3.0, 5e9)


def test_the_first_round_is_not_counted():
    found = rollout.measured(out(4.0, 2.0, 3e9), CELL)
    assert found["drawn_per_second"] == 2 and found["step_seconds"] == 2 and found["pictures_per_second"] == 1
    assert found["decode_seconds"] == 6 / 24


def test_the_page_says_what_the_json_says(tmp_path):
    made = Pretended(tmp_path, "cpu", "fp32", 1)
    cell = rollout.run_cell(made, CELL, 2)
    assert made.turns == ["make", "prefopt", "baseline", "baseline", "prefopt"]
    assert cell["shares"] == {"faster": pytest.approx(1.25), "step": pytest.approx(2 / 3), "memory": pytest.approx(0.6)}

    def write(cell, load=0.2):
        found = {"environment": {**bench.environment(made), "load_before": load}, "repeats": 2, "cells": [cell]}
        (tmp_path / "bench-diffusion-rollout.json").write_text(json.dumps(found))

    assert "make bench-diffusion-rollout-gpu" in report.rollout_block(tmp_path, "-gpu")
    write(cell)
    block = report.rollout_block(tmp_path, "")
    assert "| prefopt (reference: adapter off) | 2.000 | 1.000 | 0.250 | 2.00 | 3.00 |" in block
    assert "| plain loop | 2.000 | 0.800 | 0.250 | 3.00 | 5.00 |" in block
    assert "| pictures/s with training, times the plain loop's | at least 1.1 | 1.25 | met |" in block
    assert "| time of an optimiser step, of the plain loop's | at most 0.85 | 0.67 | met |" in block
    assert "busy" not in block
    write({**cell, "shares": {"faster": 1.0, "step": 0.9, "memory": 0.9}}, load=11.4)
    assert "busy with other work (a load of 11 " in report.rollout_block(tmp_path, "")
    assert report.rollout_block(tmp_path, "").count("not met") == 3


@pytest.mark.parametrize("end", ["", "-gpu"])
def test_published_results_hold_together(end):
    path = ROOT / "docs" / f"bench-diffusion-rollout{end}.json"
    if not path.is_file():
        pytest.skip("not run yet")
    found = json.loads(path.read_text(encoding="utf-8"))
    for cell in found["cells"]:
        known = {f: cell[f] for f in asdict(CELL)}
        for name, row in cell["sides"].items():
            again = [rollout.measured(raw, replace(CELL, **known)) for raw in cell["raw"][name]]
            assert all(row[key] == bench.summary([m[key] for m in again]) for key in row)
        assert all(gap <= rollout.COMPARED[what][end == "-gpu"] for what, gap in cell["largest_difference"].items())
        assert found["repeats"] == len(cell["raw"]["prefopt"]) and len(cell["raw"]["prefopt"][0]["drawing"]) == cell["rounds"]
