"""scripts/bench*.py: what is trained, what is made of the times, and what goes into docs/performance.md. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from pathlib import Path
from statistics import fmean, pstdev

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # they import one another
bench, data, report, worker = (importlib.import_module(f"bench{part}") for part in ("", "_data", "_report", "_worker"))
pictures, picture_worker = (importlib.import_module(f"bench_diffusion{part}") for part in ("", "_worker"))
sys.path.pop(0)


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(data.MIXES))
def test_every_step_has_the_stated_mean_lengths(name):
    mix, batch = data.MIXES[name], 8
    rows = data.pairs(mix, steps=3, batch=batch, seed=1)
    assert len(rows) == 24
    for step in range(3):
        part = rows[step * batch : (step + 1) * batch]
        for column, mean, end in (("prompt", mix.prompt, 0), ("chosen", mix.chosen, 1), ("rejected", mix.rejected, 1)):
            counts = [len(row[column].split()) + end for row in part]  # a reply ends with one token more
            assert fmean(counts) == pytest.approx(mean, abs=1)
            assert len(set(counts)) > 4
    assert max(len(f"{r['prompt']}{r['chosen']}".split()) for r in rows) < sum(mix.longest)


def test_lengths_have_the_stated_spread_and_limit():
    drawn = data.lengths(random.Random(0), 2000, mean=300, sigma=0.8, longest=10_000)
    assert pstdev(math.log(x) for x in drawn) == pytest.approx(0.8, abs=0.03)
    assert fmean(drawn) == pytest.approx(300, abs=1)
    cut = data.lengths(random.Random(0), 2000, mean=300, sigma=0.8, longest=600)
    assert max(cut) == 600 and fmean(cut) == pytest.approx(300, abs=1)


def test_cpu_mixes_stay_under_the_length_at_which_trl_cuts():
    assert all(sum(data.MIXES[name].longest) <= 1024 for name in ("hh", "ultrafeedback"))


def test_rows_are_the_same_for_the_same_seed_only():
    one, same, other = (data.pairs(data.MIXES["hh"], 1, 4, seed) for seed in (0, 0, 1))
    assert one == same != other


def test_both_sides_see_each_step_s_rows_in_one_order(tmp_path):
    from prefopt.data.batch import step_rows

    rows = data.pairs(data.MIXES["hh"], steps=3, batch=4, seed=0)
    paths = data.write_rows(tmp_path, "x", rows, batch=4)
    theirs, ours = ([json.loads(line) for line in Path(paths[side]).read_text().splitlines()] for side in ("trl", "prefopt"))
    assert theirs == rows
    assert ours != rows, "prefopt would shuffle them into another order"
    assert [ours[r] for step in range(3) for r in step_rows(12, 4, step, seed=0)] == rows


def test_texts_have_exactly_their_lengths_in_tokens(tmp_path):
    from transformers import AutoTokenizer

    from prefopt.data.tokenise import Tokeniser
    from tests import toy

    data.save_model(tmp_path, data.SHAPES["tiny"])
    words = Tokeniser(AutoTokenizer.from_pretrained(tmp_path), toy.data_config(), 8192)
    row = data.pairs(data.MIXES["hh"], 1, 4, seed=0)[0]
    tokens = words(toy.example(**row))
    assert len(tokens.prompt) == len(row["prompt"].split())
    for branch, column in zip(tokens.branches, ("chosen", "rejected"), strict=True):
        assert branch.trained == len(branch.ids) == len(row[column].split()) + 1
    assert words.tokenizer.unk_token_id not in tokens.prompt


# ---- what is made of the times -------------------------------------------------------------------


def out(ends, losses=(0.7, 0.6), peak=4_000_000_000, chosen=-100.0):
    return {"peak_bytes": peak, "runs": [{"ends": ends, "losses": list(losses), "logps": {"chosen": chosen, "rejected": -90.0},
                                          "reference_seconds": 1.0, "steps_begin": 5.0}]}  # fmt: skip


def test_the_first_step_is_not_part_of_the_steady_rate():
    found = bench.measured(out([30.0, 34.0, 38.0]), batch=8)
    assert found["first_step_seconds"] == 30.0 and found["pairs_per_second"] == 2.0


def test_useful_work_is_that_of_the_steady_steps():
    repeats = [{"manifest": {"peak": {"tflops": t}}, "efforts": [{"useful": 9e9}, {"useful": 4e9}, {"useful": 2e9}]} for t in (0.1, 0.2)]
    assert bench.useful_work(repeats, batch=3) == (0.2e12, 1e9)
    assert bench.useful_work([{"manifest": {}, "efforts": []}], batch=3) == (None, 0.0)


def test_summary_is_the_median_and_the_range():
    assert bench.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (out([1, 2], losses=(0.7, 0.601)), "loss of step 2"),
        (out([1, 2], losses=(0.702, 0.6)), "loss of step 1"),
        (out([1, 2], chosen=-100.2), "chosen replies"),
        (out([1, 2], losses=(0.7, float("nan"))), "loss of step 2"),
    ],
    ids=["second loss", "first loss", "log-prob", "nan"],
)
def test_sides_that_train_something_else_stop_the_benchmark(other, what):
    ours, theirs = bench.measured(out([1, 2]), 4), bench.measured(other, 4)
    with pytest.raises(SystemExit, match=what):
        bench.check_equal("cell", {"prefopt": [ours], "TRL default": [theirs]}, "fp32")


def test_sides_may_differ_by_rounding():
    ours, theirs = bench.measured(out([1, 2]), 4), bench.measured(out([1, 2], losses=(0.7, 0.6003)), 4)
    assert bench.check_equal("cell", {"prefopt": [ours], "TRL default": [theirs]}, "fp32") == pytest.approx(5e-4)


class Pretended(bench.Bench):
    """A bench whose processes are made up: prefopt takes 1 s a step, TRL 4 s, precomputed 3 s."""

    def side(self, name, cell, objectives, **more):
        self.turns.append(name)
        if name == "TRL Liger":
            return {"failed": "no Triton\n"}
        pace = {"prefopt": 1.0, "TRL default": 4.0, "TRL precomputed": 3.0, "live reference": 1.25}[name]
        made = out([10 + pace * i for i in range(1, cell.steps + 1)], peak=3_000_000_000 if name == "prefopt" else 5_000_000_000)
        return {**made, "runs": made["runs"] * len(objectives)}


def pretended(tmp_path):
    made = Pretended(tmp_path, "cpu", "fp32", 2)
    made.turns = []
    return made


def result(tmp_path):
    made, sides = pretended(tmp_path), ("prefopt", "TRL default", "TRL precomputed", "TRL Liger")
    cell = bench.Cell(bench.DPO, "hh", sides, batch=4, steps=3, repeats=2)
    found = {"mode": "cpu", "environment": bench.environment(made), "cells": [bench.run_cell(made, cell)], "seconds": 60}
    sweep = bench.Cell(bench.DPO, "hh", ("prefopt", "live reference"), batch=4, steps=1, repeats=1)
    found["sweep"] = bench.run_sweep(made, sweep)
    return {**found, "targets": bench.reached(bench.CPU_TARGETS, found)}, made.turns


def test_sides_take_turns_and_ratios_are_ours_to_theirs(tmp_path):
    found, turns = result(tmp_path)
    assert turns[:7] == ["prefopt", "TRL default", "TRL precomputed", "TRL Liger", "TRL default", "TRL precomputed", "prefopt"]
    cell = found["cells"][0]
    assert cell["sides"]["TRL default"]["speedup"] == pytest.approx(4.0) and cell["sides"]["prefopt"]["speedup"] == 1.0
    assert cell["sides"]["TRL default"]["memory"] == pytest.approx(0.6)
    assert cell["failed"] == {"TRL Liger": "no Triton\n"} and len(cell["raw"]["prefopt"]) == 2
    # reference 1 s, then from 5 s to 11 s (11.25 s)
    assert found["sweep"]["ratios"]["live reference"] == pytest.approx(7.0 / 7.25)


def test_targets_say_whether_they_are_met(tmp_path):
    found, _ = result(tmp_path)
    verdict = {t["what"]: t["met"] for t in found["targets"]}
    assert verdict == {
        "pairs/s, DPO on the HH mix, over TRL default": True,
        "pairs/s, DPO on the HH mix, over TRL precomputed": True,
        "peak memory, DPO on the HH mix, of TRL default's": False,
        "time of a sweep of six, of six runs with a live reference": False,
    }


def test_gpu_targets_take_trl_s_fastest_side(tmp_path):
    found, _ = result(tmp_path)
    cell = found["cells"][0]["name"]
    assert report.Target("", 2.0, True, cell, "best", "speedup").value(found) == pytest.approx(3.0)
    assert report.Target("", 2.0, True, "another", "best", "speedup").value(found) is None


@pytest.mark.parametrize("mode", ["cpu", "gpu", "ablate"])
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_plans_name_cells_that_targets_know(mode, quick):
    cells, sweep = bench.plan(mode, quick, repeats=3)
    sides = set(bench.TRL_SIDES) | set(bench.ABLATIONS)
    assert all(cell.sides[0] == "prefopt" and set(cell.sides) <= sides and cell.mix in data.MIXES for cell in cells)
    assert len({cell.name for cell in cells}) == len(cells)
    if not quick:
        names = {cell.name for cell in cells} | ({"sweep"} if sweep else set())
        wanted = {"cpu": bench.CPU_TARGETS, "gpu": bench.GPU_TARGETS, "ablate": ()}[mode]
        assert {t.cell for t in wanted} <= names


def test_the_sweep_has_six_objectives_that_read_the_reference():
    import yaml

    from prefopt.training.setup import make_objective

    assert len(bench.SWEEP) == 6
    for settings in bench.SWEEP:
        known = yaml.safe_load((ROOT / "conf" / "algo" / f"{settings['name']}.yaml").read_text())
        assert "reference" in make_objective({**known, **settings}).quantities


def test_cells_that_are_run_again_take_the_place_of_the_earlier(tmp_path):
    old = {**result(tmp_path)[0], "fits": []}
    other = {**old["cells"][0], "name": "other"}
    new = {**old, "cells": [{**old["cells"][0], "batch": 99}], "sweep": None, "seconds": 5}
    both = bench.merged({**old, "cells": [old["cells"][0], other]}, new)
    assert [(c["name"], c["batch"]) for c in both["cells"]] == [("other", 4), (old["cells"][0]["name"], 99)]
    assert both["sweep"] == old["sweep"] and both["seconds"] == 65
    with pytest.raises(SystemExit, match="threads"):
        bench.merged(old, {**new, "environment": {**new["environment"], "threads": 64}})


@pytest.mark.parametrize("most", [0, 1, 5, 37, 100])
def test_the_largest_that_holds_is_found_to_an_eighth(most):
    tried = []
    found = worker.largest(lambda n: tried.append(n) or n <= most, 1, 64)
    assert found <= most and (most >= 64 or most - found <= most // 8) and max(tried) <= 64
    assert found == 64 if most == 100 else True


# ---- what goes into the docs -----------------------------------------------------------------------


def test_insert_replaces_what_stands_between_markers():
    page = "before\n<!-- a -->\nold\n<!-- /a -->\nafter\n"
    assert report.insert(page, "a", r"new \1") == "before\n<!-- a -->\nnew \\1\n<!-- /a -->\nafter\n"
    for broken in ("before", page + page, "<!-- /a --> <!-- a -->"):
        with pytest.raises(ValueError):
            report.insert(broken, "a", "new")


PICTURES = ("diffusion-cpu", "diffusion-gpu")
ROLLOUTS = ("", "-gpu")


def test_render_writes_tables_and_a_plot(tmp_path):
    found, _ = result(tmp_path)
    (tmp_path / "img").mkdir()
    (tmp_path / "bench-cpu.json").write_text(json.dumps(found))
    marked = (*report.MODES, "head", *PICTURES, *(f"diffusion-rollout{end}" for end in ROLLOUTS))
    (tmp_path / "performance.md").write_text("".join(f"<!-- bench-{m} -->\n<!-- /bench-{m} -->\n" for m in marked))
    report.render(tmp_path)
    page, plot = (tmp_path / "performance.md").read_text(), (tmp_path / "img" / "bench-cpu.svg").read_text()
    assert "| TRL default | 1.000 | 4.00 | 5.00 | 0.60 |" in page and "| prefopt | 4.000 | 1.00 |" in page
    assert "at least 4 | 4.00 | met |" in page and "at most 0.5 | 0.60 | not met |" in page and "no Triton" in page
    assert report.MISSING["gpu"] in page and "prefopt 4.00 times as fast" in plot
    again = page
    report.render(tmp_path)
    assert (tmp_path / "performance.md").read_text() == again


def test_the_page_says_what_the_json_says():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert report.insert(page, "bench-head", report.head_block(ROOT / "docs")) == page, "make bench-docs"
    for where in ("cpu", "gpu"):
        assert report.insert(page, f"bench-diffusion-{where}", report.pictures_block(ROOT / "docs", where)) == page, "make bench-docs"
    for end in ROLLOUTS:
        assert report.insert(page, f"bench-diffusion-rollout{end}", report.rollout_block(ROOT / "docs", end)) == page, "make bench-docs"
    for mode in report.MODES:
        assert report.insert(page, f"bench-{mode}", report.block(ROOT / "docs", mode)) == page, "make bench-docs"
        if (path := ROOT / "docs" / f"bench-{mode}.json").is_file():
            plot = (ROOT / "docs" / "img" / f"bench-{mode}.svg").read_text(encoding="utf-8")
            assert plot == report.plot(json.loads(path.read_text(encoding="utf-8"))), "make bench-docs"


@pytest.mark.parametrize("mode", report.MODES)
def test_published_results_hold_together(mode):
    path = ROOT / "docs" / f"bench-{mode}.json"
    if not path.is_file():
        pytest.skip("not run yet")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert {"cpu", "cores", "threads", "versions", "date", "precision"} <= found["environment"].keys()
    for cell in found["cells"]:
        for name, row in cell["sides"].items():
            rates = [raw["pairs_per_second"] for raw in cell["raw"][name]]
            assert row["pairs_per_second"] == bench.summary(rates)
        assert cell["largest_difference"] <= bench.TOLERANCE[found["environment"]["precision"]]
    wanted = {"cpu": bench.CPU_TARGETS, "gpu": bench.GPU_TARGETS, "ablate": ()}[mode]
    assert found["targets"] == bench.reached(wanted, found)


def test_a_kept_job_is_not_done_again_and_a_changed_one_is(tmp_path, monkeypatch):
    done = []

    def process(words, **_):
        job = json.loads(Path(words[-1]).read_text())
        done.append(job["batch"])
        Path(job["out"]).write_text(json.dumps({"batch": job["batch"]}))
        return type("Result", (), {"returncode": 0})

    monkeypatch.setattr(bench.subprocess, "run", process)
    cell = bench.Cell(bench.DPO, "hh", ("prefopt",), batch=2, steps=1, repeats=1, shape="tiny")

    def side(cell, turn="0"):
        return bench.Bench(tmp_path, "cpu", "fp32", 1).side("prefopt", cell, [cell.objective], turn=turn)

    assert side(cell) == side(cell) == {"batch": 2} and done == [2]
    assert side(cell, "1") == {"batch": 2} and done == [2, 2], "another repeat is another job"
    assert side(bench.replace(cell, batch=3)) == {"batch": 3} and done == [2, 2, 3]


def test_the_readme_quotes_the_benchmark():
    cell = next(c for c in json.loads((ROOT / "docs" / "bench-cpu.json").read_text())["cells"] if c["name"] == bench.HH)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    default, best = cell["sides"]["TRL default"], cell["sides"]["TRL tuned, precomputed"]
    assert f"{default['speedup']:.1f} times as fast as TRL's default and {best['speedup']:.1f} times as fast as its best" in readme
    assert f"in {default['memory']:.2f} and {best['memory']:.2f} of their memory" in readme


# ---- pictures --------------------------------------------------------------------------------------


def picture_side(pace, peak, chosen=-100.0, steps=3, loss=0.6):
    return {"ends": [10 + pace * i for i in range(1, steps + 1)], "steps_begin": 8.0, "peak_bytes": peak, "reference": "stored (0 of 8)",
            "losses": [0.69] + [loss] * (steps - 1), "logps": [[chosen, -90.0]] * steps}  # fmt: skip


class PretendedPictures(pictures.Bench):
    """prefopt takes 1 s a step, the plain loop 2 s."""

    def job(self, kind, cell, folder, **more):
        folder.mkdir(parents=True)
        self.turns.append(kind)
        return picture_side(1.0 if kind == "prefopt" else 2.0, 3e9 if kind == "prefopt" else 5e9)

    @property
    def turns(self):
        return self.__dict__.setdefault("_turns", [])


def picture_result(tmp_path):
    made = PretendedPictures(tmp_path, "cpu", "fp32", 1)
    cell = pictures.replace(pictures.CELLS["cpu"][0], resolution=32, steps=3)
    return {"environment": bench.environment(made), "repeats": 2, "cells": [pictures.run_cell(made, cell, 2)]}, made.turns


def test_sides_of_the_picture_benchmark_take_turns(tmp_path):
    found, turns = picture_result(tmp_path)
    assert turns == ["make", "sites", "prefopt", "baseline", "baseline", "prefopt"]
    cell = found["cells"][0]
    assert cell["faster"] == pytest.approx(2.0) and cell["share"] == pytest.approx(0.6) and cell["largest_difference"] == 0


def test_the_block_of_the_picture_benchmark_says_what_its_json_says(tmp_path):
    found, _ = picture_result(tmp_path)
    assert "make bench-diffusion-cpu" in report.pictures_block(tmp_path, "cpu")
    (tmp_path / "bench-diffusion-cpu.json").write_text(json.dumps(found))
    block = report.pictures_block(tmp_path, "cpu")
    assert "| full: times as fast | at least 1.5 | 2.00 | met |" in block
    assert "| full: of its peak memory | at most 0.7 | 0.60 | met |" in block
    assert "| prefopt (reference: stored) | 2.000 | 3.00 | 8.0 |" in block and "| plain loop | 1.000 | 5.00 | 8.0 |" in block


OTHERS = {"loss of step 2": picture_side(1, 1, loss=0.61), "log-prob of the chosen": picture_side(1, 1, chosen=-100.01)}


@pytest.mark.parametrize(("what", "other"), OTHERS.items(), ids=OTHERS)
def test_picture_sides_that_train_something_else_stop_the_benchmark(what, other):
    with pytest.raises(SystemExit, match=what):
        pictures.check_equal("cell", picture_side(1, 1), other, "fp32")


@pytest.mark.parametrize("where", sorted(pictures.CELLS))
def test_cells_of_pictures_have_shapes_and_names_of_their_own(where):
    cells = pictures.CELLS[where]
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in (*cells, *map(pictures.tiny, cells)):
        assert cell.shape in picture_worker.SHAPES and cell.resolution % 64 == 0 and cell.batch % cell.micro == 0


def test_the_run_of_a_picture_cell_is_a_run_of_prefopt(tmp_path, monkeypatch):
    """Every word of its command line is known."""
    from dataclasses import asdict

    from prefopt.launch import app

    found = []
    monkeypatch.setitem(app.TASKS, "train", found.append)
    for cell in pictures.CELLS["cpu"]:
        job = {**asdict(cell), "work": str(tmp_path), "model": str(tmp_path), "rows": str(tmp_path / "rows.jsonl"), "cuda": False,
               "threads": 1, "precision": "fp32"}  # fmt: skip
        app.run("train", picture_worker.words(job))
        cfg = found[-1]
        assert cfg.model.lora.enabled == cell.lora and (cfg.noise.pool == 1) == cell.stored and cfg.noise.dropout == 0
        assert cfg.algo["beta"] * 4 * (cell.resolution // 8) ** 2 == pytest.approx(cell.beta)
